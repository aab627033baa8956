"""The README's measured numbers, and those of the manual's serving table, are the stored results' in notebooks/results.

The manual's Fisher engine is timed by ``make bench``, whose numbers are the machine's.
"""

import base64
import itertools
import math
import re
from functools import cache
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from coin.reporting.results import requested_policy
from coin.reporting.tables import risk_totals

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
RESULTS = NOTEBOOKS / "results"
README = (NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8")
MANUAL = (NOTEBOOKS / "MANUAL.md").read_text(encoding="utf-8")


def simulated(scenario: str, experts: int) -> pd.DataFrame:
    frame = pd.read_csv(RESULTS / "serving" / f"{scenario}-{experts}" / "simulation.csv")
    return frame.set_index(["redundancy", "want"])


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if math.isfinite(seconds) else "∞"


def tails(experts: int, redundancy: str) -> list[str]:
    """p99.9 in ms with its interval, for every scenario and want."""
    cells = []
    for scenario in ("rare-stragglers", "stragglers", "failures"):
        for want in ("one", "all"):
            row = simulated(scenario, experts).loc[(redundancy, want)]
            middle, *ends = map(milliseconds, (row.p999, row.p999_low, row.p999_high))
            cells.append("∞" if ends == ["∞", "∞"] else f"{middle} [{', '.join(ends)}]")
    return cells


def memory(experts: int, *redundancies: str) -> str:
    rows = [simulated("failures", experts).loc[(redundancy, "one")] for redundancy in redundancies]
    return "; ".join(f"{row.memory_server / 2**20:.0f}, {row.memory / 2**20:.0f}" for row in rows)


@pytest.mark.parametrize(
    ("experts", "redundancy", "name"),
    [
        (3, "uncoded", "uncoded"),
        (3, "spare", "**spare**"),
        (3, "coded_hedged", "coded_hedged"),
        (8, "spare", "**spare**"),
        (8, "coded_hedged", "coded_hedged"),
    ],
)
def test_the_manuals_serving_table_is_that_of_the_simulations(experts: int, redundancy: str, name: str) -> None:
    kinds = ("spare", "spare_half", "spare_int8") if redundancy == "spare" else (redundancy,)
    cells = [f"{experts}, {name}", memory(experts, *kinds), *tails(experts, redundancy)]
    assert f"| {' | '.join(cells)} |" in MANUAL
    assert set(simulated("stragglers", experts).seeds) == {20}


def test_the_manual_tells_how_right_decoded_answers_are() -> None:
    right = simulated("failures", 3)[["standing_in_accuracy"]].xs("one", level="want").standing_in_accuracy
    rows = measured("experts")
    eight = rows[rows.groupby("experiment").task.transform("nunique") == 8]
    own = eight[(eight.method == "refit") & (eight.decoder == "feature_ridge")]
    assert own.seed.nunique() == 5
    assert (
        f"Right, N = 3: spare {100 * right.spare:.1f} %, int8 {100 * right.spare_int8:.1f}, decoded (`refit`, "
        f"`feature_ridge`) {100 * right.coded_hedged:.1f}; N = 8, of other tasks, five seeds: spare "
        f"{100 * own.expert_accuracy.mean():.1f}, decoded {100 * own.decoded_accuracy.mean():.1f}."
    ) in " ".join(MANUAL.split())


def test_the_manuals_serving_table_has_no_other_rows() -> None:
    assert len(re.findall(r"^\| \d, ", MANUAL, flags=re.MULTILINE)) == 5


@cache
def measured(suite: str, lost: int = 1) -> pd.DataFrame:
    """The rows of a suite's sweep where so many experts are lost."""
    frame = pd.read_csv(RESULTS / suite / "sweep.csv", keep_default_na=False, na_values={"residual": [""], "nda": [""]})
    return frame[frame.erased.str.count(r"\+") + 1 == lost]


DECODERS = ("linear", "feature_ridge")


def unasked(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """A method's rows, of BatchNorm's policies the one that nobody asked for."""
    return rows[(rows.method == method) & rows.batchnorm.map(requested_policy).isin(["", "keep", "auto"])]


def points(rows: pd.DataFrame, method: str, decoder: str) -> "pd.Series[float]":
    """The mean NDA over tasks in % of every point of a grid: one draw of base and seed."""
    own = unasked(rows[rows.decoder == decoder], method)
    return 100 * own.groupby("experiment").nda.mean()


def spread(values: "pd.Series[float]") -> str:
    return f"{values.mean():.1f} ± {values.std():.1f}" if len(values) else "–"


def ndas(rows: pd.DataFrame, method: str) -> str:
    return " / ".join(spread(points(rows, method, decoder)) for decoder in DECODERS)


def cost(rows: pd.DataFrame, method: str, column: str = "merge_passes") -> float:
    return float(unasked(rows, method)[column].mean())


def times(method: str, column: str, digits: int) -> str:
    """How many times what a method costs distillation does, suite by suite."""
    rows = [measured(suite) for suite in SUITES]
    *first, last = [f"{cost(each, 'distillation', column) / cost(each, method, column):.{digits}f}" for each in rows]
    return f"{', '.join(first)} and {last} times"


NAMES = {
    "none": "*none: no coded model*",
    "average": "`Average`",
    "coin": "`Coin`",
    "head_fit": "`HeadFit`",
    "refit": "**`Refit`**",
    "distillation": "`Distillation`, 150 steps",
    "readout_distillation": "`ReadoutDistillation`, 100 steps",
}


SUITES = {
    "imagenet-pair": "ImageNet pair",
    "imagenet-triple": "triple",
    "pair": "small pair",
    "real": "MNIST + CIFAR-10",
}
"""The README's columns."""


def table() -> str:
    """The README's table, NDA by suite, and the passes on the first suite."""
    suites = {suite: measured(suite) for suite in SUITES}
    cells = {method: [ndas(rows, method) for rows in suites.values()] for method in NAMES}
    pair = suites["imagenet-pair"]
    costs = {method: f"{cost(pair, method) / 1000:.0f}k" if cost(pair, method) else "0" for method in NAMES}
    rows = [f"| {name} | {' | '.join(cells[method])} | {costs[method]} |" for method, name in NAMES.items()]
    return "\n".join([f"| merge | {' | '.join(SUITES.values())} | passes |", "| --- " * 6 + "|", *rows])


def reached(method: str, decoder: str) -> list[str]:
    """In how many of the runs of each of the README's suites 97.5 % is reached, as ``3 of 5``."""
    each = [points(measured(suite), method, decoder) for suite in SUITES]
    return [f"{(ndas >= 97.5).sum()} of {len(ndas)}" for ndas in each]


def risks(method: str, decoder: str) -> tuple[str, ...]:
    """How many answers are foretold to differ from the expert's, how many do, and how many of the surest 95 %: in %."""
    totals = risk_totals(pd.read_csv(RESULTS / "risk/risk.csv", keep_default_na=False))
    own = totals[(totals["name"] == method) & (totals.decoder == decoder) & (totals.curve == "coverage")].set_index(
        "at"
    )
    shares = (own.risk[1.0], 1 - own.agreement[1.0], 1 - own.agreement[0.95])
    return tuple(f"{100 * share:.1f}" for share in shares)


def by_few_samples(method: str) -> str:
    """The mean NDA with 25 calibration samples a task, linear / feature_ridge."""
    rows = measured("samples")
    few = rows[rows.samples_per_task == 25]
    return " / ".join(f"{points(few, method, decoder).mean():.1f}" for decoder in DECODERS)


def exposed() -> str:
    """How an expert half-way back to its start fares, and in what share of batches of 8 it is found out, in %."""
    rows = pd.read_csv(RESULTS / "silent-faults/faults.csv", keep_default_na=False)
    half = rows[(rows.fault == "half-way") & (rows.batch == 8)]
    found = 100 * half.groupby("method")[["alarm", "named", "false_alarm"]].mean()
    coded, alone, seeds = found.loc["refit"], found.loc["none"], rows.seed.nunique()
    over = f"({rows.experts.min()} to {rows.experts.max()} experts, {seeds} seed{'s' if seeds > 1 else ''})"
    return (
        f"({100 * half.expert_accuracy.mean():.1f} → {100 * half.faulty_accuracy.mean():.1f} % right), is exposed by 8 "
        f"unlabelled inputs in {coded.alarm:.1f} % of cases and named in {coded.named:.1f} %, at "
        f"{coded.false_alarm:.1f} % false alarms; without a coded model in {alone.alarm:.1f} and {alone.named:.1f} %, "
        f"at {alone.false_alarm:.1f} % {over}."
    )


def sentences() -> list[str]:
    pair, demo = measured("imagenet-pair"), pd.read_csv(RESULTS / "demo/summary.csv", keep_default_na=False)
    demo = demo[demo.task == "mean"].set_index(["method", "decoder"])
    shown = {
        method: " / ".join(
            f"{100 * row.nda_mean:.1f} ± {100 * row.nda_std:.1f}" for row in (demo.loc[(method, d)] for d in DECODERS)
        )
        for method in ("average", "coin", "refit", "distillation")
    }
    demo_times = (
        demo.loc[("distillation", "linear")].merge_passes_mean / demo.loc[("refit", "linear")].merge_passes_mean
    )
    foretold, found, kept = risks("refit", "feature_ridge")
    told, were, _ = risks("refit", "linear")
    triple, small, real = measured("imagenet-triple"), measured("pair"), measured("real")
    vit = measured("transformer")
    best = {method: spread(points(vit, method, "feature_ridge")) for method in ("coin", "distillation", "refit")}
    refit_linear, refit_features = reached("refit", "linear"), reached("refit", "feature_ridge")
    distilled, coded = reached("distillation", "feature_ridge"), reached("coin", "feature_ridge")
    read_out = reached("readout_distillation", "feature_ridge")
    few = [by_few_samples(method) for method in ("coin", "refit", "distillation")]
    return [
        f"two seeds, linear / feature_ridge decoder: average {shown['average']}, COIN {shown['coin']}, `Refit` in "
        f"closed form **{shown['refit']}**, distillation on the same samples at {demo_times:.0f} times its passes "
        f"{shown['distillation']}",
        f"{foretold} % foretold, {found} % found; of the 95 % of least risk {kept} % differ; linear, fitted on the "
        f"same samples: {told} and {were} %",
        f"to MNIST digits and letters A–J, {pair.seed.nunique()} seeds",
        f"with a third expert, {triple.seed.nunique()} seeds",
        f"without restraint, {small.experiment.nunique()} runs",
        f"on CIFAR-10, {real.experiment.nunique()} runs",
        f"`Refit` reaches it with the linear decoder in {refit_linear[0]} ImageNet pairs, and with features in "
        f"{refit_features[0]}, {refit_features[1]} triples and {refit_features[2]} small pairs; trained models "
        f"with features only: distillation in {distilled[0]}, {distilled[1]} and {distilled[2]}, readout distillation "
        f"in {read_out[0]}, {read_out[1]} and {read_out[2]}; COIN likewise, in {coded[0]} ImageNet pairs; on MNIST + "
        "CIFAR-10 nothing does",
        f"it takes {times('refit', 'merge_passes', 0)} the passes of `Refit` on the four suites, though "
        f"{times('refit', 'merge_seconds', 1)} its seconds on a CPU; and {times('coin', 'merge_passes', 0)} the passes "
        "of COIN",
        f"25 samples a task are 0.6 % of the small pair's, linear / feature_ridge: COIN {few[0]}, `Refit` {few[1]}, "
        f"distillation {few[2]}, {measured('samples').seed.nunique()} seeds",
        f"with features, COIN is the best of all: {best['coin']}, distillation {best['distillation']}, `Refit` "
        f"{best['refit']}, {vit.experiment.nunique()} runs",
        f"at most 2 % differ, at 95 % confidence (`Refit`, own head: {promised()})",
        f"*A wrong expert*, half-way back to its start {exposed()}",
    ]


KEPT = {
    ("none", "feature_ridge"): "nothing: the survivors alone",
    ("average", "expert_head"): "`Average`, own head",
    ("coin", "linear"): "`Coin`, the paper's decoder",
    ("coin", "feature_ridge"): "`Coin`, `feature_ridge`",
    ("distillation", "feature_ridge"): "`Distillation`, `feature_ridge`",
    ("wudi", "expert_head"): "`Wudi` (no data), own head",
    ("refit", "linear"): "`Refit`, the paper's decoder",
    ("refit-both", "linear"): "`Refit(both)`, the paper's decoder",
    ("refit", "feature_ridge"): "`Refit`, `feature_ridge`",
    ("refit-both", "feature_ridge"): "`Refit(both)`, `feature_ridge`",
    ("refit-both", "expert_head-own"): "`Refit(both)`, own head corrected",
    ("refit", "expert_head"): "**`Refit`, own head**",
    ("refit-3bit-int8base", "expert_head"): "the same in 3 bits, int8 base",
    ("refit-4bit-nobase", "expert_head"): "**the same in 4 bits, no base**",
    ("spare-8bit-nobase", "replica"): "experts in 8 bits",
    ("spare-3bit-int8base", "replica"): "**experts' deltas in 3 bits**, int8 base",
    ("spare-rank8-int8base", "replica"): "experts' deltas of rank 8, int8 base",
}
"""What the README's first table compares."""

STAND_INS = {
    suite: name
    for suite, name in {
        "imagenet-pair": "ImageNet pair",
        "small-pair": "small pair",
        "vit": "small ViT",
        "experts": "8 experts",
    }.items()
    if (RESULTS / f"stand-ins-{suite}").is_dir()
}
"""The suites that are measured."""


@cache
def stood_in(suite: str) -> pd.DataFrame:
    """The rows of a suite of stand-ins, of the most experts, with what is kept in networks."""
    rows = measured(f"stand-ins-{suite}")
    rows = rows[rows.groupby("experiment").task.transform("nunique") == (8 if suite == "experts" else 2)]
    rows = rows.assign(memory_mib=pd.to_numeric(rows.memory_mib))
    network = rows[(rows.method == "average") & (rows.decoder == "linear")].memory_mib.mean()
    return rows.assign(networks=rows.memory_mib / network)


def stand_in_table() -> str:
    lines = []
    for (method, decoder), name in KEPT.items():
        every = {suite: stood_in(suite) for suite in STAND_INS}
        own = [rows[(rows.method == method) & (rows.decoder == decoder)] for rows in every.values()]
        if not (found := [part for part in own if len(part)]):
            continue
        counts = [found[0], *(own[place] for place, suite in enumerate(every) if suite == "experts")]
        kept = [f"{part.networks.mean():.2f}" if len(part) else "–" for part in counts]
        losses = "all" if float(found[0].losses.iloc[0]) > 1 else "1"
        ndas = [spread(100 * part.groupby("experiment").nda.mean()) for part in own]
        runs = (
            "N" if decoder in ("linear", "feature_ridge") and method != "none" else "N − 1" if method == "none" else "1"
        )
        lines.append(f"| {name} | {' / '.join(kept)} | {runs} | {losses} | {' | '.join(ndas)} |")
    head = f"| kept | networks | runs | losses | {' | '.join(STAND_INS.values())} |"
    return "\n".join([head, "| --- " * (4 + len(STAND_INS)) + "|", *lines])


def promised() -> str:
    """What is accepted of the stand-in's answers on the ImageNet pair, and how many of these differ: in %."""
    rows = pd.read_csv(RESULTS / "stand-ins-imagenet-pair/promise.csv", keep_default_na=False)
    own = rows[(rows.method == "refit") & (rows.decoder == "expert_head")].astype({"coverage": float, "found": float})
    assert set(own.alpha) == {0.02}
    return f"{100 * own.coverage.mean():.1f} % are accepted and {100 * own.found.mean():.1f} % of these differ"


def test_the_readmes_first_table_is_that_of_the_stand_ins() -> None:
    assert stand_in_table() in README, f"expected\n{stand_in_table()}"


def test_the_readmes_table_is_that_of_the_sweeps() -> None:
    assert table() in README, f"expected\n{table()}"


def test_the_readmes_sentences_are_those_of_the_results() -> None:
    text = " ".join(README.split())
    for sentence in sentences():
        assert sentence in text, f"expected {sentence}"


def test_coin_is_ten_points_and_more_behind_distillation_with_the_linear_decoder() -> None:
    assert "which is ten points and more behind it with the linear decoder" in " ".join(README.split())
    for suite in SUITES:
        rows = measured(suite)
        assert points(rows, "distillation", "linear").mean() - points(rows, "coin", "linear").mean() >= 10


def reaching(decoder: str) -> set[tuple[str, str]]:
    """The methods that reach 97.5 % with a decoder in some run of a suite, with the suite."""
    each = itertools.product(NAMES, SUITES)
    return {(method, suite) for method, suite in each if (points(measured(suite), method, decoder) >= 97.5).any()}


def test_nothing_else_reaches_what_the_paper_reports() -> None:
    assert reaching("linear") == {("refit", "imagenet-pair")}
    features = reaching("feature_ridge")
    assert {method for method, _ in features} == {"refit", "distillation", "readout_distillation", "coin"}
    assert "real" not in {suite for _, suite in features}
    assert {suite for method, suite in features if method == "coin"} == {"imagenet-pair"}


def test_with_features_refit_is_ahead_of_distillation_at_every_number_of_samples() -> None:
    study = nbformat.read(NOTEBOOKS / "03_results.ipynb", as_version=4)
    assert any("With features `refit` is ahead of distillation at every P" in cell.source for cell in study.cells)
    rows = pd.concat([measured("samples"), measured("pair")])  # 200 samples are the pair's
    assert set(rows.samples_per_task) == {25, 100, 200, 400, 1600}
    for count in rows.samples_per_task.unique():
        own = rows[rows.samples_per_task == count]
        assert points(own, "refit", "feature_ridge").mean() > points(own, "distillation", "feature_ridge").mean()


def test_the_readme_has_no_other_measured_number() -> None:
    text = " ".join(
        re.sub(r"```.*?```", "", README.replace(table(), "").replace(stand_in_table(), ""), flags=re.DOTALL).split()
    )
    for sentence in sentences():
        text = text.replace(sentence, "")
    for told in ("[arXiv 2409.01420](https://arxiv.org/abs/2409.01420)", "97.5 %", "1 %", "Apache-2.0"):  # the paper's
        text = text.replace(told, "")
    assert re.findall(r"\d+\.\d+|\d+ %|\d ±", text) == []


def test_the_readmes_figure_is_one_of_the_notebooks() -> None:
    (path,) = re.findall(r"!\[.*?\]\((\S+\.png)\)", README)
    cells = nbformat.read(NOTEBOOKS / "03_results.ipynb", as_version=4).cells
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    shown = [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]
    assert (NOTEBOOKS.parent / path).read_bytes() in shown
