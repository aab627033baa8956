"""The tables and figures of measured numbers in README.md and docs, made from the results in notebooks/results.

    python notebooks/tables.py    # writes the tables, between <!-- table: NAME --> and <!-- end -->, and the figures

NDAs are in %, the mean over tasks, ± the standard deviation over the runs of a suite: seeds and draws of the base.
"""

import math
import re
from io import StringIO
from pathlib import Path

import docstring_parser
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import binom
from stored import (
    DECODERS,
    RESULTS,
    cost,
    markdown,
    measured,
    ndas,
    network_mib,
    of_stand_ins,
    percent,
    rivals,
    rows_of,
    spread,
    stood_in,
)

from coin.reporting import read_results, standin_table, standins
from coin.reporting.choice import shortlist, undominated
from coin.reporting.figures import COLOURS, MARKERS, WIDTH, nda_against_memory, style
from coin.reporting.results import COLUMNS, Row
from coin.reporting.tables import print_table

NOTEBOOKS = Path(__file__).parent
FILES = (NOTEBOOKS.parent / "README.md", *sorted(NOTEBOOKS.glob("docs/*.md")))
SUITES = {
    "imagenet-pair": "ImageNet pair",
    "vit-*": "small ViT",
    "photos": "six on photos",
}
KEPT = {
    ("none", "feature_ridge"): "the survivors alone",
    ("average", "expert_head"): "`Average`, own head",
    ("coin", "linear"): "`Coin`, the paper's decoder",
    ("coin", "expert_head"): "`Coin`, own head",
    ("coin", "feature_ridge"): "`Coin`, `feature_ridge`",
    ("distillation", "linear"): "`Distillation`, the paper's decoder",
    ("distillation", "feature_ridge"): "`Distillation`, `feature_ridge`",
    ("refit", "linear"): "`Refit`, the paper's decoder",
    ("refit", "feature_ridge"): "`Refit`, `feature_ridge`",
    ("refit", "expert_head"): "`Refit`, own head",
    ("refit-4bit", "expert_head"): "`Refit`, own head, 4 bits",
    ("refit+rank4", "expert_head"): "`Refit` with adapters of rank 4",
    ("refit+rank4-4bit", "expert_head"): "`Refit` with adapters of rank 4, 4 bits",
    ("refit+rank4-5bit", "expert_head"): "`Refit` with adapters of rank 4, 5 bits",
    ("refit+rank16", "expert_head"): "`Refit` with adapters of rank 16",
    ("refit+rank16-4bit", "expert_head"): "**`Refit` with adapters, 4 bits**",
    ("refit+rank16-5bit", "expert_head"): "`Refit` with adapters, 5 bits",
    ("refit+lora16-4bit", "expert_head"): "`Refit` with plain LoRA, 4 bits",
    ("average+rank16-4bit", "expert_head"): "the average with adapters, 4 bits",
    ("average+rank16-5bit", "expert_head"): "the average with adapters, 5 bits",
    ("base+rank16-4bit", "expert_head"): "the base with adapters, 4 bits",
    ("base+rank16-5bit", "expert_head"): "the base with adapters, 5 bits",
    ("distillation+rank16", "expert_head"): "distillation with adapters",
    ("distillation+rank16-4bit", "expert_head"): "distillation with adapters, 4 bits",
    ("replica-2bit-int8base", "replica"): "copies of the experts, 2-bit deltas",
    ("replica-3bit-int8base", "replica"): "copies of the experts, 3-bit deltas",
}
"""What may stand in for a lost expert: method and decoder, and how the tables call it; adapters are of rank 16."""

REAL = [
    ("none", "feature_ridge"),
    ("coin", "linear"),
    ("coin", "feature_ridge"),
    ("distillation", "linear"),
    ("distillation", "feature_ridge"),
    ("refit", "expert_head"),
    ("refit+rank4-4bit", "expert_head"),
    ("refit+rank16", "expert_head"),
    ("refit+rank16-4bit", "expert_head"),
    ("refit+rank16-5bit", "expert_head"),
    ("refit+lora16-4bit", "expert_head"),
    ("average+rank16-4bit", "expert_head"),
    ("average+rank16-5bit", "expert_head"),
    ("base+rank16-4bit", "expert_head"),
    ("base+rank16-5bit", "expert_head"),
    ("replica-3bit-int8base", "replica"),
    ("replica-2bit-int8base", "replica"),
]
"""The rows of the table of real fleets."""

IN_SHORT = {
    ("average", "linear"): "coded model by `Average`, the paper's decoder",
    ("coin", "linear"): "coded model by `Coin`, the paper's decoder",
    ("distillation", "linear"): "coded model by `Distillation`, the paper's decoder",
    ("distillation", "feature_ridge"): "coded model by `Distillation`, regression",
    ("refit+rank16-4bit", "expert_head"): "**body by `Refit` with adapters, in four bits**",
    ("base+rank16-4bit", "expert_head"): "the base as body with adapters, in four bits",
    ("replica-3bit-int8base", "replica"): "copies, in three bits",
}
"""The rows of the README's table, and what it calls them."""

FLEETS = {
    "photos": "six experts on photos",
    "resnet50": "four experts of ResNet50",
    "intents": "ten experts for intents",
}
"""The real fleets: their suites, and what tables call them."""

CLAIMED = [
    ("coin", "linear"),
    ("coin", "feature_ridge"),
    ("distillation", "feature_ridge"),
    ("refit", "feature_ridge"),
    ("refit+rank16", "expert_head"),
]
"""What the paper's claims are checked on."""

DRAWN = {
    ("none", "feature_ridge"): ("none: the survivors alone", "feature_ridge"),
    ("average", "expert_head"): ("average", "own head"),
    ("coin", "linear"): ("coin", "the paper's decoder"),
    ("coin", "feature_ridge"): ("coin", "feature_ridge"),
    ("distillation", "feature_ridge"): ("distillation", "feature_ridge"),
    ("refit", "expert_head"): ("refit", "own head"),
    ("refit-4bit", "expert_head"): ("refit in 4 bits", "own head"),
    ("refit+rank16-4bit", "expert_head"): ("refit in 4 bits", "with adapters"),
    ("base+rank16-4bit", "expert_head"): ("base in 4 bits", "with adapters"),
    ("replica-3bit-int8base", "replica"): ("replica", "copies in 3-bit deltas"),
    ("replica-2bit-int8base", "replica"): ("replica", "copies in 2-bit deltas"),
}
"""The points of the figure of stand-ins: method and decoder, and what they are called in it."""

RIVALS = {
    "average+svd": "the average and SVD of W_i − W̄",
    "average+svd-mixed": "the average and SVD, mixed bits",
    "average+qera": "the average and SVD weighted by inputs",
    "base+svd": "the base and SVD of W_i − W₀",
    "base+svd-mixed": "the base and SVD, mixed bits",
    "base+qera": "the base and SVD weighted by inputs",
    "emr": "EMR-Merging",
    "tall": "TALL-masks",
    "ultradelta-0.01": "UltraDelta, 0.01 of a network each",
    "ultradelta-0.02": "UltraDelta, 0.02 of a network each",
    "feat_cal": "FeatCal, one network for all",
    "magic": "MAGIC, one network for all",
    "ace": "ACE-Merging, one network for all",
}
FAR = 5
"""What makes a method far cheaper than another: so many times fewer passes."""
FLEET = {
    ("refit+rank16-4bit", "expert_head"): "`Refit` with adapters, 4 bits",
    ("base+rank16-4bit", "expert_head"): "the base with adapters, 4 bits",
    ("refit-4bit", "expert_head"): "`Refit`, one network for all, 4 bits",
    ("replica-3bit-int8base", "replica"): "copies, 3-bit deltas",
    ("replica-2bit-int8base", "replica"): "copies, 2-bit deltas",
}
"""What is measured from two experts to many."""


def forwards_and_losses(method: str, decoder: str, rows: pd.DataFrame) -> list[str]:
    """Return how many networks run for one lost answer, and how many experts may be lost."""
    forwards = "N − 1" if method == "none" else "N" if decoder in DECODERS else "one"
    losses = "all" if float(rows.losses.iloc[0]) > 1 else "one"
    return [forwards, losses]


def stand_ins() -> str:
    """What stands in: its memory with two and with six experts, networks run for an answer, losses, NDA by suite."""
    rows = []
    every = {suite: stood_in(suite) for suite in SUITES}
    for method, decoder in KEPT:
        own = {suite: rows_of(part, method, decoder) for suite, part in every.items()}
        present = [part for part in own.values() if len(part)]
        if not present:
            continue
        of_two = [own[suite] for suite in SUITES if suite != "photos" and len(own[suite])]
        memory = [
            f"{part.networks.mean():.2f}" if len(part) else "–"
            for part in (of_two[0] if of_two else [], own["photos"])
        ]
        found = [spread(ndas(part, method, decoder)) for part in every.values()]
        runs = forwards_and_losses(method, decoder, present[0])
        rows.append([KEPT[method, decoder], " / ".join(memory), *runs, *found])
    heads = ["what stands in", "memory, N = 2 / 6", "forwards", "lost", *SUITES.values()]
    return markdown(heads, rows)


def of_fleet(fleet: str) -> pd.DataFrame:
    """Return a real fleet's rows, with both memories in networks."""
    rows = measured(fleet)
    size = network_mib(rows)
    return rows.assign(networks=rows.memory_mib / size, resident=rows.resident_mib / size)


def agreements(rows: pd.DataFrame, method: str, decoder: str) -> "pd.Series[float]":
    """The mean agreement with the experts over tasks in %, one number for each run of a suite."""
    own = rows_of(rows, method, decoder)
    return 100 * own.groupby("run").agreement.mean()


def nda_and_agreement(rows: pd.DataFrame, method: str, decoder: str) -> str:
    """Return both with one digit, their spread where there are several runs."""
    both = ndas(rows, method, decoder), agreements(rows, method, decoder)
    return ", ".join(map(spread, both)) if len(both[0]) else "–"


def real_fleets() -> str:
    """What stands in in real fleets: memory, NDA and agreement in each."""
    every = {fleet: of_fleet(fleet) for fleet in FLEETS}
    rows = []
    for method, decoder in REAL:
        sizes = [rows_of(part, method, decoder).networks for part in every.values()]
        memory = " / ".join(f"{each.mean():.2f}" if len(each) else "–" for each in sizes)
        both = [nda_and_agreement(part, method, decoder) for part in every.values()]
        rows.append([KEPT[method, decoder], memory, *both])
    names = [f"{name}: NDA, agreement" for name in FLEETS.values()]
    return markdown(["what stands in", "memory", *names], rows)


def real_in_short() -> str:
    """The README's table: what stands in, its memory for six experts, and its NDA on photos and with ResNet50."""
    network = network_mib(measured("photos"))
    of_photos = standins(measured("photos")).set_index(["method", "decoder"])
    of_resnet50 = standins(measured("resnet50")).set_index(["method", "decoder"])
    rows = []
    for pair, name in IN_SHORT.items():
        memory = f"{of_photos.memory_mib[pair] / network:.3g}"
        both = [percent(of_photos.nda_mean[pair]), percent(of_resnet50.nda_mean[pair])]
        rows.append([name, memory, *both])
    return markdown(["what stands in", "memory", "photos", "ResNet50"], rows)


def fleets_experts() -> str:
    """How good the experts of the real fleets are: the share of test samples that they are right on, by task."""
    lines = []
    for fleet, name in FLEETS.items():
        rows = rows_of(of_fleet(fleet), "average", "expert_head")
        right = 100 * rows.groupby("task", sort=False).expert_accuracy.mean()
        each = ", ".join(f"{task} {share:.1f}" for task, share in right.items())
        lines.append([name, str(rows.run.nunique()), each])
    return markdown(["fleet", "seeds", "right on test samples, %"], lines)


def claims(target: float = 97.5) -> str:
    """The paper's claims: in how many runs they hold, where they hold best, and what that takes."""
    of_suites = {name: measured(suite) for suite, name in (SUITES | FLEETS).items()}
    rows = []
    claim = f"NDA above {target} % in some cases"
    for method, decoder in CLAIMED:
        found = {suite: ndas(part, method, decoder) for suite, part in of_suites.items()}
        best = max(found, key=lambda suite: float(found[suite].mean()))
        every = pd.concat([*found.values()])
        took = f"{cost(of_suites[best], method) / 1000:.1f}k passes"
        holds = f"{(every >= target).sum()} of {len(every)} runs"
        rows.append([claim, KEPT[method, decoder], holds, f"{best}: {spread(found[best])}", took])
        claim = ""
    claim = f"far cheaper than distillation: in fewer than 1/{FAR} of its passes"
    for method in ("coin", "refit", "refit+rank16"):
        times = [cost(part, "distillation") / cost(part, method) for part in of_suites.values()]
        cheaper, name = (
            f"{sum(each > FAR for each in times)} of {len(times)} suites",
            KEPT[method, "expert_head"],
        )
        passes = f"distillation takes {min(times):.1f} to {max(times):.0f} times as many"
        rows.append([claim, name.removesuffix(", own head"), cheaper, "–", passes])
        claim = ""
    return markdown(["the paper", "measured", "holds in", "best", "cost"], rows)


def rivals_table() -> str:
    """What the rivals keep of the experts on photos, with bodies in 8 and in 4 bits, and their memory."""
    found = rivals()
    rows = []
    order = found[["method", "rank"]].drop_duplicates()
    order = order.sort_values(
        "method", key=lambda names: names.map(list(RIVALS).index), kind="stable"
    )
    for method, rank in order.itertuples(index=False):
        own = found[(found.method == method) & (found["rank"] == rank)]
        name = RIVALS[method] + (f" to rank {rank}" if rank else "")
        for bits in (8, 4):
            memory = f"{own[f'networks_{bits}bit'].mean():.2f}"
            both = [percent(own[f"{each}_{bits}bit"].mean()) for each in ("nda", "agreement")]
            rows.append([f"{name}, {bits} bits", memory, *both])
    return markdown(["rival", "memory", "NDA", "agreement"], rows)


def fleets() -> pd.DataFrame:
    """Of fleets of N experts, for every stand-in: NDA, the worst task's and agreement in %, and memory in networks."""
    rows = measured("fleet-*")
    network = fleet_network_mib()
    found = []
    for count, part in rows.groupby(rows.groupby("run").task.transform("nunique")):
        for pair, name in FLEET.items():
            own = rows_of(part, *pair)
            found.append(
                {
                    "experts": count,
                    "name": name,
                    "nda": 100 * own.nda.mean(),
                    "agreement": 100 * own.agreement.mean(),
                    "worst": 100 * own.nda.min(),
                    "networks": own.memory_mib.mean() / network,
                }
            )
    return pd.DataFrame(found)


def fleet_network_mib() -> float:
    """The size of one network of the fleets in MiB, with the heads of two experts."""
    return float(rows_of(measured("fleet-*"), "refit", "expert_head").memory_mib.min())


def fleet() -> str:
    """NDA, agreement, the worst task's NDA and the memory, from two experts to many."""
    found, lines = fleets(), []
    for name, part in found.groupby("name", sort=False):
        cells = [
            f"{row.nda:.1f}, {row.agreement:.1f} ({row.worst:.1f}), {row.networks:.2f}"
            for row in part.itertuples()
        ]
        lines.append([name, *cells])
    counts = found.experts.unique()
    return markdown(["what stands in", *(f"N = {count}" for count in counts)], lines)


Point = tuple[int, int]  # rank, bits of the body


def frontier() -> str:
    """NDA, agreement, the worst task's NDA and memory by rank and bits; bold: best in agreement and memory."""
    columns = {}
    for count in (2, 8, 32):
        rows = measured(f"frontier-{count}")
        columns[f"N = {count}"] = frontier_points(rows, fleet_network_mib())
    photos_network = network_mib(measured("photos"))
    columns["six on photos"] = frontier_points(measured("frontier-photos"), photos_network)
    every = sorted({point for points in columns.values() for point in points})
    lines = []
    for point in every:
        rank, bits = point
        cells = [
            frontier_cell(points[point], points) if point in points else "–"
            for points in columns.values()
        ]
        lines.append([str(rank), str(bits), *cells])
    return markdown(["rank", "bits of the body", *columns], lines)


def frontier_points(rows: pd.DataFrame, network: float) -> dict[Point, dict[str, float]]:
    """Return the memory in networks, and in % NDA, agreement and the worst task's NDA, by rank and bits."""
    points = {}
    for method in rows.method.unique():
        named = re.fullmatch(r"refit\+rank(\d+)-(\d)bit", method)
        if named is None:
            continue
        rank, bits = named.groups()
        own = rows_of(rows, method, "expert_head")
        points[int(rank), int(bits)] = {
            "memory": own.memory_mib.mean() / network,
            "nda": 100 * own.nda.mean(),
            "agreement": 100 * own.agreement.mean(),
            "worst": 100 * own.nda.min(),
        }
    return points


def frontier_cell(own: dict[str, float], points: dict[Point, dict[str, float]]) -> str:
    """Return the text of a point, in bold where it is Pareto-optimal in agreement and memory."""
    text = f"{own['nda']:.1f}, {own['agreement']:.1f} ({own['worst']:.1f}), {own['memory']:.2f}"
    pair = (-own["memory"], own["agreement"])
    others = [(-other["memory"], other["agreement"]) for other in points.values()]
    is_beaten = any(
        other != pair and other[0] >= pair[0] and other[1] >= pair[1] for other in others
    )
    return text if is_beaten else f"**{text}**"


def layers() -> str:
    """How far the outputs of blocks are from the experts', by what stands in."""
    rows = pd.read_csv(RESULTS / "photos/layers.csv")
    names = {
        "weighted svd": "the SVD weighted by inputs, body rounded to the nearest",
        "in order": "adapters fitted in order, the same body",
        "rounded by inputs": "adapters fitted in order, body rounded knowing of its inputs",
    }
    means = rows.groupby(["method", "block"]).error.mean()
    blocks = rows.block.unique()
    lines = []
    for method, name in names.items():
        lines.append([name, *(f"{100 * means[method, block]:.2f}" for block in blocks)])
    heads = [f"block {place}" for place in range(1, len(blocks) + 1)]
    return markdown(["", *heads], lines)


def lora() -> str:
    """What a LoRA of a fully fine-tuned network keeps of it, by how it was made and its rank."""
    rows = pd.read_csv(RESULTS / "lora/lora.csv")
    names = {
        "extract_lora": "`coin.extract_lora`",
        "svd": "SVD of W − W₀",
        "svd, own vectors": "the same, with the network's own biases and normalisations",
    }
    means = rows.groupby(["way", "rank"])[["nda", "agreement"]].mean() * 100
    ranks = rows["rank"].unique()
    lines = []
    for way, name in names.items():
        cells = [means.loc[(way, rank)] for rank in ranks]
        lines.append([name, *(f"{each.nda:.1f}, {each.agreement:.1f}" for each in cells)])
    return markdown(["NDA, agreement", *(f"rank {rank}" for rank in ranks)], lines)


def promises() -> str:
    """What is accepted of the answers that the experts' own heads give, and how many of these differ."""
    seeds = sorted((RESULTS / "imagenet-pair").glob("seed-*"))
    rows = pd.concat([pd.read_csv(seed / "promise.csv") for seed in seeds])
    lines = []
    for method in ("refit+rank16-4bit", "base+rank16-4bit", "refit"):
        own = rows_of(rows, method, "expert_head")
        (alpha,) = set(own.alpha)
        shares = f"{100 * alpha:.0f}", percent(own.coverage.mean()), percent(own.found.mean())
        lines.append([KEPT[method, "expert_head"].strip("*"), *shares])
    return markdown(["", "at most may differ", "accepted", "of these differ"], lines)


def wrong_experts() -> str:
    """An expert half-way back to its start: how right it is, and how often batches of 8 and 32 expose it."""
    rows = pd.read_csv(RESULTS / "silent-faults/faults.csv", keep_default_na=False)
    half = rows[rows.fault == "half-way"]
    before, after = half.expert_accuracy.mean(), half.faulty_accuracy.mean()
    right = f"{percent(before)} → {percent(after)}"
    found = half.groupby(["batch", "method"])[["alarm", "named", "false_alarm"]].mean()
    names = {"refit": "with a coded model (`Refit`)", "none": "without"}
    cells = []
    for size in (8, 32):
        for method, name in names.items():
            shares = map(percent, found.loc[(size, method)])
            cells.append([str(size), name, right, *shares])
    return markdown(
        ["inputs", "", "the expert is right", "exposed", "named", "false alarms"], cells
    )


def demo() -> str:
    """The end of what `make demo` prints."""
    console = Console(width=80, file=StringIO())
    kept = standins(read_results(RESULTS / "quickstart/seed-0"))
    print_table(standin_table(kept)[shortlist(kept)], console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    return "\n".join(["```", *filter(None, lines), "```"])


EXPERTS, PER_SECOND, ANSWER, BUSY = 1000, 1.0, 0.02, 0.5
"""Of the sizing: experts, queries a second for each, seconds of an answer, the share of time a server may be busy."""
PACKED, UNPACKING = 1.3, 0.25
"""How much longer a packed body takes than an expert, with one image, and seconds to unpack an expert's copy."""


def sizing() -> str:
    """How many servers stand in for a thousand experts of which a share is lost, and their memory, by the fleets."""
    rows = measured("fleet-*")
    network = fleet_network_mib()
    sizes = rows.groupby(rows.groupby("run").task.transform("nunique"))
    resident = {
        count: {pair: rows_of(part, *pair).resident_mib.mean() for pair in FLEET}
        for count, part in sizes
    }
    few, many = resident[8], resident[32]
    memory = {}
    for pair in (("refit+rank16-4bit", "expert_head"), ("replica-3bit-int8base", "replica")):
        of_one = (many[pair] - few[pair]) / (32 - 8)
        memory[pair[0]] = few[pair] + (EXPERTS - 8) * of_one
    kinds = {  # MiB of a server, and the seconds of an answer
        "body with adapters": (memory["refit+rank16-4bit"], PACKED * ANSWER),
        "copies": (memory["replica-3bit-int8base"], ANSWER + UNPACKING),
        "all weights": (EXPERTS * network, ANSWER),
    }
    lines = []
    for share in (0.001, 0.01, 0.05):
        most = int(binom.ppf(0.999, EXPERTS, share))
        cells = [f"{100 * share:g} %", str(most)]
        for mib, seconds in kinds.values():
            servers = math.ceil(most * PER_SECOND * seconds / BUSY)
            cells.append(f"{servers} × {mib:,.0f} MiB")
        lines.append([*cells, f"{most} × {network:.0f} MiB"])
    return markdown(["lost at a time", "at most", *kinds, "spares, one expert each"], lines)


SERVED = {
    "uncoded": "nothing",
    "replica": "`replica`: all experts' weights",
    "copies": "`replica` of copies in 3-bit deltas",
    "standin-packed": "`standin`: the body with adapters, 4 bits, packed",
    "coded_hedged": "`coded_hedged`: with the survivors",
}
"""What stands on the one server more, and how the tables of failover call it."""


def timed(row: pd.Series, name: str) -> str:
    """Return a median time in ms, in brackets the least and the largest; ``∞`` where nothing came."""
    found = [
        f"{row[each]:.0f}" if math.isfinite(row[each]) else "∞"
        for each in (name, f"{name}_low", f"{name}_high")
    ]
    return found[0] if len({*found}) == 1 else f"{found[0]} [{found[1]}, {found[2]}]"


def failover() -> str:
    """What a client of three experts sees when servers are killed or stopped, by what stands on one server more."""
    events = pd.read_csv(RESULTS / "failover" / "events.csv").set_index(["setup", "event"])
    killed = {"1": "one killed", "2": "two", "all": "all", "stopped": "one stopped"}
    rows = []
    for setup, name in SERVED.items():
        own = events.loc[setup]
        memory = own.loc["1", "stand_in_mib"]
        first = [timed(own.loc[event], "first_right_ms") for event in killed]
        failed = [
            percent(own.loc[event, "failed"] / own.loc[event, "asked"])
            for event in ("1", "all", "machine")
        ]
        late = percent(own.loc["1", "beyond"])
        rows.append([name, "–" if math.isnan(memory) else f"{memory:.0f}", *first, *failed, late])
    first = [f"first answer, ms: {what}" for what in killed.values()]
    failed = [f"failed, %: {what}" for what in ("one killed", "all", "one and the stand-in")]
    return markdown(
        ["on one server more", "MiB", *first, *failed, "failed or late, %: one killed"], rows
    )


def failover_accuracy() -> str:
    """How accurate all answers are as experts are lost, and how many come in time at a high load without one."""
    accuracy = pd.read_csv(RESULTS / "failover" / "accuracy.csv").set_index(["setup", "lost"])
    loads = pd.read_csv(RESULTS / "failover" / "loads.csv").set_index(["setup", "lost", "load"])
    few, many = loads.index.levels[2].min(), loads.index.levels[2].max()
    rows = []
    for setup in accuracy.index.unique("setup"):
        accuracies = [percent(accuracy.loc[(setup, lost), "accuracy"]) for lost in range(4)]
        goodput = [f"{loads.loc[(setup, 1, load), 'goodput']:.0f}" for load in (few, many)]
        rows.append([SERVED[setup], *accuracies, *goodput])
    asked = [
        f"{loads.rate[loads.index.get_level_values('load') == load].iloc[0]:.0f}"
        for load in (few, many)
    ]
    right = [f"right, %: {lost} lost" for lost in range(4)]
    rates = [f"in time of {rate} a second, 1 lost" for rate in asked]
    return markdown(["on one server more", *right, *rates], rows)


def one_slow() -> str:
    """What a client waits where one of three experts is five times as slow."""
    slow = pd.read_csv(RESULTS / "failover" / "slow.csv").set_index("setup")
    rows = []
    for setup, row in slow.iterrows():
        times = [f"{row[f'{name}_ms']:.0f}" for name in ("p50", "p99")]
        rows.append([SERVED[str(setup)], *times])
    return markdown(["on one server more", "p50, ms", "p99, ms"], rows)


def columns() -> str:
    """The columns of results.csv, as the package describes them."""
    described = {
        each.arg_name: each.description or ""
        for each in docstring_parser.parse(Row.__doc__ or "").params
    }
    rows = [[f"`{name}`", " ".join(described[name].replace("``", "`").split())] for name in COLUMNS]
    return markdown(["column", "what it is"], rows)


TABLES = {
    "demo": demo,
    "real fleets in short": real_in_short,
    "real fleets": real_fleets,
    "experts": fleets_experts,
    "stand-ins": stand_ins,
    "claims": claims,
    "rivals": rivals_table,
    "fleet": fleet,
    "frontier": frontier,
    "layers": layers,
    "lora": lora,
    "promises": promises,
    "wrong experts": wrong_experts,
    "failover": failover,
    "failover accuracy": failover_accuracy,
    "one slow": one_slow,
    "sizing": sizing,
    "columns": columns,
}


def figure(suite: str = "imagenet-pair") -> Figure:
    """Memory against NDA of some of what may stand in on a suite."""
    kept, network = of_stand_ins(suite)
    marked = kept.assign(is_best=undominated(kept)).set_index(["method", "decoder"])
    drawn = marked.loc[list(DRAWN)]
    drawn.index = pd.MultiIndex.from_tuples(DRAWN.values(), names=drawn.index.names)
    drawn = drawn.reset_index()
    return nda_against_memory(drawn, drawn.is_best, network)


def fleet_figure() -> Figure:
    """NDA and memory from two experts to many."""
    found = fleets()
    with style():
        drawn = Figure(figsize=(WIDTH, 2.9))
        panels = {"networks": "memory (networks)", "worst": "NDA of the worst task (%)"}
        for axes, (column, label) in zip(drawn.subplots(1, 2), panels.items(), strict=True):
            for place, (name, part) in enumerate(found.groupby("name", sort=False)):
                look = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 4.5}
                plain = name.replace("`", "") if column == "worst" else None
                axes.plot(part.experts, part[column], label=plain, linewidth=1.3, **look)
            axes.set(xlabel="experts, N", ylabel=label, xscale="log", xticks=found.experts.unique())
            axes.set_xticks(found.experts.unique(), found.experts.unique())
            axes.minorticks_off()
        drawn.legend(loc="outside lower center", ncols=2)
        return drawn


SHOWN = {
    "replica": "a spare server with all weights",
    "standin-packed": "body with adapters, 4 bits",
    "copies": "copies in 3-bit deltas",
    "coded_hedged": "coded model, with the survivors",
}
"""What the figure of failover shows."""


def failover_figure() -> Figure:
    """What a client of three experts sees as these are killed: right answers, and the wait for the first of them."""
    accuracy = pd.read_csv(RESULTS / "failover" / "accuracy.csv")
    events = pd.read_csv(RESULTS / "failover" / "events.csv")
    killed = events[events.event.isin(["1", "2", "all"])]
    with style():
        drawn = Figure(figsize=(WIDTH, 2.9))
        left, right = drawn.subplots(1, 2)
        for place, (setup, name) in enumerate(SHOWN.items()):
            look = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 4.5}
            own = accuracy[accuracy.setup == setup]
            left.plot(own.lost, 100 * own.accuracy, linewidth=1.3, **look)
            waits = killed[(killed.setup == setup) & killed.first_right_ms.lt(math.inf)]
            right.plot(waits.lost, waits.first_right_ms, label=name, linewidth=1.3, **look)
        left.set(ylabel="right answers (%)", ylim=(0, 100), xticks=range(4))
        right.set(ylabel="first answer after (ms)", ylim=(0, None), xticks=range(1, 4))
        for axes in (left, right):
            axes.set_xlabel("experts killed, of three")
        drawn.legend(loc="outside lower center", ncols=2)
        return drawn


FIGURES = {"stand-ins": figure, "fleet": fleet_figure, "failover": failover_figure}


def labels(drawn: Figure) -> str:
    """What a figure says, its texts and the values of its lines; its file has this text too."""
    told = [text.get_text() for legend in drawn.legends for text in legend.get_texts()]
    for axes in drawn.axes:
        for line in axes.lines:
            values = [f"{value:.4g}" for value in line.get_ydata()]
            told.append(" ".join(values))
    return "; ".join(told)


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
    with style():
        for name, draw in FIGURES.items():
            drawn = draw()
            metadata = {"Software": None, "Description": labels(drawn)}
            drawn.savefig(RESULTS / f"{name}.png", dpi=200, facecolor="white", metadata=metadata)
