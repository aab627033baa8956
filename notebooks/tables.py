"""The tables and the figure of measured numbers in README.md and docs, made from the results in notebooks/results.

    python notebooks/tables.py    # writes the tables, between <!-- table: NAME --> and <!-- end -->, and the figure

NDAs are in %, the mean over tasks, ± the standard deviation over the runs of a suite: seeds and draws of the base.
"""

import math
import re
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import docstring_parser
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from stored import (
    DECODERS,
    RESULTS,
    both_decoders,
    cost,
    markdown,
    measured,
    milliseconds,
    ndas,
    of_stand_ins,
    percent,
    simulated,
    spread,
    stood_in,
)

from coin.coding.decoder_config import REPLICA
from coin.reporting.figures import nda_against_memory
from coin.reporting.results import COLUMNS, Row
from coin.reporting.style import style
from coin.reporting.summary import read_summary, stand_ins as summary_stand_ins
from coin.reporting.tables import finding, rich_table, stand_in_table

NOTEBOOKS = Path(__file__).parent
FILES = (NOTEBOOKS.parent / "README.md", *sorted(NOTEBOOKS.glob("docs/*.md")))
SUITES = {
    "imagenet-pair": "ImageNet pair",
    "imagenet-triple": "triple",
    "pair": "small pair",
    "real": "MNIST + CIFAR-10",
}
METHODS = {
    "none": "*none: no coded model*",
    "average": "`Average`",
    "coin": "`Coin`",
    "head_fit": "`HeadFit`",
    "refit": "**`Refit`**",
    "distillation": "`Distillation`, 150 steps",
}
CLAIMED = (
    ("coin", "linear", "`Coin`, the paper's decoder"),
    ("coin", "feature_ridge", "`Coin`, `feature_ridge`"),
    ("refit", "linear", "`Refit`, the paper's decoder"),
    ("refit", "feature_ridge", "`Refit`, `feature_ridge`"),
    ("distillation", "feature_ridge", "`Distillation`, `feature_ridge`"),
)
"""What the paper's claims are checked on: method, decoder, and how the table calls them."""
STAND_INS = {
    "imagenet-pair": "ImageNet pair",
    "small-pair": "small pair",
    "vit": "small ViT",
    "experts": "8 experts",
}
KEPT = {
    ("none", "feature_ridge"): "nothing: the survivors alone",
    ("base", "expert_head"): "the base itself, own head",
    ("base", "feature_ridge"): "the base itself, `feature_ridge`",
    ("average", "expert_head"): "`Average`, own head",
    ("average", "feature_ridge"): "`Average`, `feature_ridge`",
    ("wudi", "expert_head"): "`Wudi` (no data), own head",
    ("coin", "linear"): "`Coin`, the paper's decoder",
    ("coin", "expert_head"): "`Coin`, own head",
    ("coin", "feature_ridge"): "`Coin`, `feature_ridge`",
    ("distillation", "linear"): "`Distillation`, the paper's decoder",
    ("distillation", "expert_head"): "`Distillation`, own head",
    ("distillation", "feature_ridge"): "`Distillation`, `feature_ridge`",
    ("refit", "linear"): "`Refit`, the paper's decoder",
    ("refit", "expert_head"): "`Refit`, own head",
    ("refit", "feature_ridge"): "`Refit`, `feature_ridge`",
    ("refit-both", "linear"): "`Refit(both)`, the paper's decoder",
    ("refit-both", "feature_ridge"): "`Refit(both)`, `feature_ridge`",
    ("average-4bit-nobase", "expert_head"): "`Average`, own head, in 4 bits",
    ("distillation-4bit-nobase", "expert_head"): "`Distillation`, own head, in 4 bits",
    ("refit-4bit-nobase", "expert_head"): "`Refit`, own head, in 4 bits",
    ("refit-3bit-int8base", "expert_head"): "`Refit`, own head, a 3-bit delta",
    ("refit+rank4", "expert_head"): "**`Refit` with adapters of rank 4**",
    ("refit+rank4-4bit-nobase", "expert_head"): "**`Refit` with adapters of rank 4, in 4 bits**",
    ("refit+rank16-4bit-nobase", "expert_head"): "`Refit` with adapters of rank 16, in 4 bits",
    ("average+rank4-4bit-nobase", "expert_head"): "`Average` with adapters of rank 4, in 4 bits",
    ("base+rank4", "expert_head"): "the base with adapters of rank 4",
    ("base+rank4-4bit-nobase", "expert_head"): "the base with adapters of rank 4, in 4 bits",
    ("replica-8bit-nobase", "replica"): "copies of the experts in 8 bits",
    ("replica-3bit-int8base", "replica"): "**copies of the experts**, 3-bit deltas from an int8 base",
    ("replica-2bit-int8base", "replica"): "copies of the experts, 2-bit deltas from an int8 base",
    ("replica-4bit-nobase", "replica"): "copies of the experts in 4 bits",
}
"""What may stand in for a lost expert: method and decoder, and how the tables call it."""

IN_SHORT = [
    ("none", "feature_ridge"),
    ("coin", "linear"),
    ("distillation", "feature_ridge"),
    ("refit-4bit-nobase", "expert_head"),
    ("refit+rank4-4bit-nobase", "expert_head"),
    ("base+rank4-4bit-nobase", "expert_head"),
    ("replica-3bit-int8base", "replica"),
]
"""The rows of the README's table."""

DRAWN = {
    ("none", "feature_ridge"): "none: survivors alone",
    ("average", "expert_head"): "average, own head",
    ("coin", "linear"): "coin, the paper's decoder",
    ("coin", "feature_ridge"): "coin, feature_ridge",
    ("distillation", "feature_ridge"): "distillation, feature_ridge",
    ("refit", "expert_head"): "refit, own head",
    ("refit-4bit-nobase", "expert_head"): "refit, own head, 4 bits",
    ("refit+rank4-4bit-nobase", "expert_head"): "refit + rank 4, 4 bits",
    ("base+rank4-4bit-nobase", "expert_head"): "base + rank 4, 4 bits",
    ("replica-3bit-int8base", "replica"): "replica: copies, 3-bit deltas",
    ("replica-8bit-nobase", "replica"): "replica: copies in 8 bits",
}
"""The points of the README's figure: method and decoder, and what they are called in it."""

DRAWN_TOO = DRAWN | {
    ("base", "expert_head"): "base, own head",
    ("distillation-4bit-nobase", "expert_head"): "distillation, own head, 4 bits",
    ("wudi", "expert_head"): "wudi, own head",
    ("refit-both", "feature_ridge"): "refit(both), feature_ridge",
    ("replica-4bit-nobase", "replica"): "replica: copies in 4 bits",
}
"""The same of the study's figures."""


def suites() -> str:
    """NDA on four suites with two decoders, and the passes on the first."""
    pair, rows = measured("imagenet-pair"), []
    for method, name in METHODS.items():
        passes = cost(pair, method)
        cells = [both_decoders(measured(suite), method) for suite in SUITES]
        rows.append([name, *cells, f"{passes / 1000:.0f}k" if passes else "0"])
    return markdown(["merge", *SUITES.values(), "passes"], rows)


def reached(target: float = 97.5) -> str:
    """In how many runs of each suite a method reaches a target."""

    def count(suite: str, method: str, decoder: str) -> str:
        found = ndas(measured(suite), method, decoder)
        return f"{(found >= target).sum()} of {len(found)}" if len(found) else "–"

    rows = [
        [name, *(" / ".join(count(suite, method, decoder) for decoder in DECODERS) for suite in SUITES)]
        for method, name in METHODS.items()
    ]
    return markdown(["merge", *SUITES.values()], rows)


def claims(target: float = 97.5) -> str:
    """The paper's claims: in how many runs they hold, where they hold best, and what it takes."""
    every, rows = {**SUITES, "transformer": "small ViT", "text": "texts"}, []
    of_suites = {name: measured(suite) for suite, name in every.items()}
    for claim, parts in (
        (f"NDA above {target} % in some cases", of_suites),
        ("the same with under 1 % of the training data (P = 25: 0.6 %)", {"small pair": of_small_pair(25)}),
    ):
        for method, decoder, name in CLAIMED:
            found = {suite: ndas(part, method, decoder) for suite, part in parts.items()}
            found = {suite: each for suite, each in found.items() if len(each)}
            best = max(found, key=lambda suite: float(found[suite].mean()))
            runs = pd.concat([*found.values()])
            took = f"{cost(parts[best], method) / 1000:.1f}k passes"
            holds = f"{(runs >= target).sum()} of {len(runs)} runs"
            rows.append([claim, name, holds, f"{best}: {spread(found[best])}", took])
            claim = ""
    for claim, method, name in (
        ("far cheaper than distillation", "coin", "`Coin`"),
        ("", "refit", "`Refit`"),
    ):
        columns = ("merge_passes", "merge_seconds")
        times = {
            suite: [cost(part, "distillation", column) / cost(part, method, column) for column in columns]
            for suite, part in of_suites.items()
        }
        best = max(times, key=lambda suite: times[suite][0])
        cheaper = sum(min(each) > 1 for each in times.values())
        passes, took = times[best]
        least = min(each[0] for each in times.values())
        where = f"distillation takes {least:.{0 if least > 1 else 1}f} to {passes:.0f} times as many passes; {best}"
        rows.append([claim, name, f"cheaper in {cheaper} of {len(times)} suites", where, f"{took:.1f} times as long"])
    return markdown(["the paper", "measured", "holds in", "best", "cost"], rows)


def dearer() -> str:
    """How many times the passes and seconds of a closed form distillation takes."""

    def times(suite: str, method: str, column: str, digits: int) -> str:
        rows = measured(suite)
        return f"{cost(rows, 'distillation', column) / cost(rows, method, column):.{digits}f}"

    rows = [
        [f"{name}, {what}", *(times(suite, method, column, digits) for suite in SUITES)]
        for method, name in (("coin", "`Coin`"), ("refit", "`Refit`"))
        for what, column, digits in (("passes", "merge_passes", 0), ("seconds", "merge_seconds", 1))
    ]
    return markdown(["distillation's cost, in those of", *SUITES.values()], rows)


def of_small_pair(samples: int) -> pd.DataFrame:
    """The rows of the small pair with so many samples of each task."""
    rows = measured("samples")
    return rows[rows.samples_per_task == samples]


def few_samples() -> str:
    """NDA with 25 to 1,600 samples of each task, and on a small vision transformer with 200."""
    parts = {f"small pair, P = {samples:,}": of_small_pair(samples) for samples in (25, 200, 1600)}
    parts["small ViT, P = 200"] = measured("transformer")
    names = {method: METHODS[method] for method in ("none", "average", "coin", "refit", "distillation")}
    rows = [[name, *(both_decoders(part, method) for part in parts.values())] for method, name in names.items()]
    return markdown(["merge", *parts], rows)


def promises() -> str:
    """What is accepted of the answers of `Refit` with the experts' own heads, and how many of these differ."""
    rows = pd.read_csv(RESULTS / "stand-ins-imagenet-pair/promise.csv", keep_default_na=False)
    own = rows[(rows.method == "refit") & (rows.decoder == "expert_head")].astype({"coverage": float, "found": float})
    (alpha,) = set(own.alpha.astype(float))
    cells = [f"{100 * alpha:.0f}", percent(own.coverage.mean()), percent(own.found.mean())]
    return markdown(["", "at most may differ", "accepted", "of these differ"], [["`Refit`, own head", *cells]])


def wrong_experts() -> str:
    """An expert half-way back to its start: how right it is, and how often batches of 8 expose it."""
    rows = pd.read_csv(RESULTS / "silent-faults/faults.csv", keep_default_na=False)
    half = rows[(rows.fault == "half-way") & (rows.batch == 8)]
    right = " → ".join(percent(half[column].mean()) for column in ("expert_accuracy", "faulty_accuracy"))
    found = half.groupby("method")[["alarm", "named", "false_alarm"]].mean()
    names = {"refit": "with a coded model (`Refit`)", "none": "without"}
    cells = [[name, right, *map(percent, found.loc[method])] for method, name in names.items()]
    return markdown(["", "the expert is right", "exposed", "named", "false alarms"], cells)


def stand_ins(kept: list[tuple[str, str]], columns: list[str]) -> str:
    """What stands in: its memory with two (and eight) experts, networks run for an answer, losses, and NDA by suite."""
    rows = []
    for method, decoder in kept:
        every = {suite: stood_in(suite) for suite in STAND_INS}
        own = {suite: part[(part.method == method) & (part.decoder == decoder)] for suite, part in every.items()}
        if (first := next((part for part in own.values() if len(part)), None)) is None:
            continue
        sizes = (first, own["experts"]) if "experts" in columns else (first,)
        memory = [f"{part.networks.mean():.2f}" if len(part) else "–" for part in sizes]
        forwards = "N − 1" if method == "none" else "N" if decoder in DECODERS else "one"
        losses = "all" if float(first.losses.iloc[0]) > 1 else "one"
        shown = [spread(100 * own[suite].groupby("experiment").nda.mean()) for suite in columns]
        rows.append([KEPT[method, decoder], " / ".join(memory), forwards, losses, *shown])
    names = [STAND_INS[suite] for suite in columns]
    return markdown(["what stands in", "memory", "forwards", "lost at once", *names], rows)


def demo() -> str:
    """The end of what `make demo` prints, of its table the row that it recommends."""
    kept = summary_stand_ins(read_summary(RESULTS / "demo"))
    table = stand_in_table(kept, all_rows=False)
    table = table[
        [finding(kept).startswith(f"In short: {row.method} with {row.decoder} ") for row in table.itertuples()]
    ]
    console = Console(width=80, file=StringIO())
    console.print(rich_table(table, "quickstart: what to keep", ["method", "decoder"]))
    console.print(finding(kept), markup=False, highlight=False)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    return "\n".join(["```", *filter(None, lines), "```"])


SERVED = {
    "uncoded": "nothing",
    "replica": "`replica`: all experts' weights",
    "replica_delta": "`replica_delta`: a base in 8 bits and 3-bit deltas",
    "standin": "`standin`: the coded model alone",
    "coded_hedged": "`coded_hedged`: with the survivors, `feature_ridge`",
}
"""What stands on the one server more, and how the table calls it."""


def serving() -> str:
    """Memory, p99.9 and accuracy of what may stand in, as simulated for three and for eight experts."""
    rows = []
    for experts in (3, 8):
        every = {scenario: simulated(scenario, experts) for scenario in ("rare-stragglers", "stragglers", "failures")}
        sizes = every["failures"]
        for redundancy, name in SERVED.items():
            size, tails = sizes.loc[(redundancy, "one")], []
            memory = f"{(size.memory - sizes.loc[('uncoded', 'one')].memory) / 2**20:.1f}"
            for found in every.values():
                for want in ("one", "all"):
                    row = found.loc[(redundancy, want)]
                    middle, *ends = map(milliseconds, (row.p999, row.p999_low, row.p999_high))
                    tails.append("∞" if ends == ["∞", "∞"] else f"{middle} [{', '.join(ends)}]")
            right = size.standing_in_accuracy
            if redundancy == "standin":
                name += ", own head corrected" if size.variant.endswith("-own") else ", own head"
            rows.append([str(experts), name, memory, *tails, "–" if math.isnan(right) else percent(right)])
    slow = [f"{what}, query for {whom}" for what in ("slow 1 %", "slow 5 %", "down 1 %") for whom in ("one", "all")]
    return markdown(["N", "on one server more", "MiB", *slow, "right, %"], rows)


def columns() -> str:
    """The columns of results.csv, as the package describes them."""
    described = {each.arg_name: each.description or "" for each in docstring_parser.parse(Row.__doc__ or "").params}
    rows = [[f"`{name}`", " ".join(described[name].replace("``", "`").split())] for name in COLUMNS]
    return markdown(["column", "what it is"], rows)


TABLES = {
    "demo": demo,
    "stand-ins in short": lambda: stand_ins(IN_SHORT, ["imagenet-pair", "small-pair"]),
    "stand-ins": lambda: stand_ins(list(KEPT), list(STAND_INS)),
    "claims": claims,
    "suites": suites,
    "reached": reached,
    "cost": dearer,
    "few samples": few_samples,
    "promises": promises,
    "wrong experts": wrong_experts,
    "serving": serving,
    "columns": columns,
}


def figure(suite: str = "imagenet-pair", drawn: Mapping[tuple[str, str], str] = DRAWN) -> Figure:
    """Memory against NDA of some of what may stand in, by default of the README's figure."""
    kept, network = of_stand_ins(suite)
    methods = kept["name"].str.removesuffix(" (keep)")  # what is said of a base with BatchNorm
    names = [drawn.get(pair, "") for pair in zip(methods, kept["decoder"], strict=True)]
    kept = kept.assign(name=names, decoder=REPLICA)[[name != "" for name in names]]
    return nda_against_memory(kept, network)


def labels(drawn: Figure) -> str:
    """What the points of a figure are called, with their numbers; its file has this text too."""
    return "; ".join(text.get_text() for axes in drawn.axes for text in axes.texts)


def with_tables(text: str) -> str:
    """Return a page with the tables between its markers made anew."""
    return re.sub(
        r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for path in FILES:
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    drawn = figure()
    with style():
        metadata = {"Software": None, "Description": labels(drawn)}
        drawn.savefig(RESULTS / "stand-ins.png", dpi=200, facecolor="white", metadata=metadata)
