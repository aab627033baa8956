"""The figures and tables of the notebooks from 03 on, from the results in notebooks/results."""

import json
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure
from stored import DECODERS, DEFAULTS, RESULTS, made, measured, of_stand_ins, runs, simulation, spread

from coin.reporting import figures, summarise
from coin.reporting.style import COLOURS, INK, MARKERS, SOFT, WIDTH, method_colour
from coin.reporting.summary import REFERENCES, decoders_of, expert_accuracies, over_tasks, variant_names
from coin.reporting.tables import percent

SUITES = ("imagenet-pair", "imagenet-triple", "pair", "real", "transformer")
"""The suites that have the same methods."""
SCENARIOS = {
    "rare-stragglers": "each machine is slow by a factor of five for a hundredth of the time",
    "stragglers": "each is slow for a twentieth of the time",
    "failures": "each is down for a hundredth of the time",
}
WAYS = {
    '{"epochs": 3, "lr": 0.01, "batch_size": 64}': "unrestricted, lr 0.01",
    '{"epochs": 3, "lr": 0.002, "batch_size": 64, "freeze_batchnorm": true}': "lr 0.002, BatchNorm frozen",
    '{"epochs": 3, "lr": 0.005, "batch_size": 64, "freeze_batchnorm": true, "l2_sp": 0.1}': "lr 0.005, frozen, L2",
}
TRAINED = {5: "last stages, lr 0.01, frozen", 1: "head only, lr 0.05, frozen"}
"""How experts are fine-tuned: the sections `expert` of the sweep, or how many parts of the network they train."""
METHODS = ("none", "average", "coin", "head_fit", "refit", "distillation")
"""What every suite has."""


def means(suite: str, methods: tuple[str, ...] = ()) -> pd.DataFrame:
    """NDA and cost over the runs of a suite, mean and deviation; of some methods, as they are by default."""
    every = over_tasks(summarise(runs(suite)))
    every = every[every.method != "oracle"]
    if not methods:
        return every
    return every[every.method.isin(methods) & every.batchnorm.isin(DEFAULTS)].assign(batchnorm="")


def of_two(part: pd.DataFrame) -> pd.DataFrame:
    """The rows of the paper's decoder and of `feature_ridge`."""
    return part[part.decoder.isin(DECODERS)]


def folded(suite: str, table: pd.DataFrame, called: str = "") -> HTML:
    """A table to unfold, under the command and the revision that made its numbers."""
    return HTML(f"<details><summary>{called or suite}: {made(suite)}</summary>{table.to_html()}</details>")


def sources(suites: tuple[str, ...]) -> str:
    """The commands and revisions of the results that a table is made of, to stand below it."""
    return f"\n\n*Made of {'; '.join(map(made, suites))}.*"


def cells(part: pd.DataFrame) -> "pd.Series[str]":
    """NDA in %, mean ± deviation."""
    return pd.Series([percent(*pair, digits=1) for pair in zip(part.nda_mean, part.nda_std, strict=True)], part.index)


def nda_table(part: pd.DataFrame) -> pd.DataFrame:
    """NDA by method and decoder, with passes and seconds of making the coded model."""
    part = part.assign(method=variant_names(part), cell=cells(part))
    shown = part.pivot_table(index="method", columns="decoder", values="cell", aggfunc="first", sort=False)
    costs = part.groupby("method", sort=False)[["merge_passes_mean", "merge_seconds_mean"]].first().round().astype(int)
    shown = shown.fillna("–").rename_axis(columns=None)
    return shown.assign(passes=costs.merge_passes_mean, seconds=costs.merge_seconds_mean)


def nda_by(part: pd.DataFrame, option: "str | pd.Series[Any]") -> pd.DataFrame:
    """NDA by decoder and method, a column for each value of an option."""
    part = part.assign(cell=cells(part), option=part[option] if isinstance(option, str) else option)
    shown = part.pivot_table(index=["decoder", "method"], columns="option", values="cell", aggfunc="first", sort=False)
    return shown[sorted(shown)].fillna("–").rename_axis(columns=option if isinstance(option, str) else None)


def accuracies(suites: tuple[str, ...]) -> pd.DataFrame:
    """How many runs there are, and how right the experts are in them."""
    found = {suite: expert_accuracies(summarise(runs(suite)))[["task", "seeds", "mean", "spread"]] for suite in suites}
    return pd.concat(found).droplevel(1)


def kept_by_count(counts: tuple[int, ...] = (2, 3, 5, 8)) -> pd.DataFrame:
    """NDA ± deviation and memory in networks, for each number of experts."""
    columns = {}
    for count in counts:
        kept, network = of_stand_ins("experts", count)
        kept = kept.set_index(["name", "decoder"])
        columns[f"N = {count}"], columns[f"networks, {count}"] = cells(kept), (kept.memory_mib / network).round(2)
    columns["runs"], columns["losses"] = kept.forwards.astype(int), kept.losses.astype(int)
    return pd.DataFrame(columns).sort_values(f"networks, {counts[-1]}").astype(object).fillna("–")


def behind_the_best(suite: str, options: dict[str, list[str]]) -> pd.DataFrame:
    """By how many points of NDA, run by run, an `auto` is behind the best fixed choice, known only afterwards."""
    rows = runs(suite)
    ndas = 100 * rows.assign(variant=variant_names(rows)).groupby(["decoder", "variant", "seed"]).nda.mean()
    lines = {}
    for asked, fixed in options.items():
        lost = {d: ndas[d].unstack().loc[fixed].max() - ndas[d].unstack().loc[asked] for d in DECODERS}
        lines[asked] = {f"{d}: {what}": f"{getattr(lost[d], what)():.1f}" for d in DECODERS for what in ("mean", "max")}
    return pd.DataFrame(lines).T


def nda_by_method(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread, a line per method's variant and a marker per decoder."""
    with figures.style():
        means = means[means["method"] != "oracle"]
        means = means.assign(name=variant_names(means), last=means["method"].isin(REFERENCES))
        names, decoders = list(dict.fromkeys(means.sort_values("last", kind="stable")["name"])), decoders_of(means)
        figure = Figure(figsize=(WIDTH, 1.7 + 0.26 * max(1.0, len(decoders) / 4) * len(names)))
        axes = figure.subplots()
        for i, decoder in enumerate(decoders):
            for row in means[means["decoder"] == decoder].to_dict("records"):
                place = names.index(row["name"]) + 0.6 * ((i + 0.5) / len(decoders) - 0.5)
                spread = 0.0 if pd.isna(row["nda_std"]) else 100 * row["nda_std"]
                look: Any = {"color": method_colour(row["name"]), "marker": MARKERS[i], "markersize": 5.5, "capsize": 2}
                axes.errorbar(100 * row["nda_mean"], place, xerr=spread, **look)
            axes.plot([], [], color=SOFT, marker=MARKERS[i], linestyle="none", label=decoder)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.axvline(97.5, color=INK, linewidth=0.9, linestyle=":")  # the paper's "in some cases"
        axes.set_xlabel("NDA (%), mean over tasks ± spread over seeds")
        figures.legend_below(figure, axes, "decoder")
        return figure


def by_experts() -> tuple[pd.DataFrame, "pd.Series[int]"]:
    """NDA and cost of one coded model for two to eight experts, and the number of experts of each row."""
    rows = runs("experts")
    found = over_tasks(summarise(rows.assign(experiment=[str(len(json.loads(tasks))) for tasks in rows.tasks])))
    found = found[found.method != "oracle"]
    return found, found.experiment.astype(int)


def by_samples() -> pd.DataFrame:
    """NDA and cost by P, of the suite `samples`."""
    rows = runs("samples")
    rows = rows[rows.decoder.isin([*DECODERS, "ridge"]) & (rows.method != "oracle")]
    return over_tasks(summarise(rows.assign(experiment="samples", batchnorm="")))


def wrong_experts() -> tuple[Figure, pd.DataFrame, pd.DataFrame]:
    """How often batches expose and name an expert that answers wrongly, and how much less right it is."""
    faults = pd.read_csv(RESULTS / "silent-faults" / "faults.csv")
    found = ["alarm", "named", "false_alarm"]
    by_seed = faults.groupby(["fault", "experts", "method", "batch", "seed"], sort=False)[found].mean()
    with figures.style():
        figure, panels = plt.subplots(2, 3, figsize=(9, 5.4), sharex=True, sharey=True)
        for column, (fault, part) in enumerate(by_seed.groupby("fault", sort=False)):
            for axes, what in zip(panels[:, column], found, strict=False):
                groups = part[what].groupby(["experts", "method"], sort=False)
                for place, ((count, method), own) in enumerate(groups):
                    at = 100 * own.groupby("batch").agg(["mean", "std"])
                    look = {"color": COLOURS[place // 2], "marker": figures.marker(place // 2), "capsize": 2}
                    look |= {"linestyle": ":" if method == "none" else "-", "label": f"N = {count}, {method}"}
                    axes.errorbar(range(len(at)), at["mean"], at["std"], **look)
                axes.set_xticks(range(len(at)), at.index)
                axes.set_title(f"{fault}: {what}")
            panels[1, column].set_xlabel("inputs in a batch")
        for axes in panels[:, 0]:
            axes.set_ylabel("batches (%)")
        figures.legend_below(figure, panels[0, 0], columns=4)
    right = faults.groupby(["fault", "experts"], sort=False)[["expert_accuracy", "faulty_accuracy"]].mean()
    mean = by_seed.groupby(["fault", "experts", "method", "batch"], sort=False).mean()
    return figure, mean.mul(100).round(1).unstack("batch"), right.mul(100).round(1)


def tails(scenario: str, experts: int) -> pd.DataFrame:
    """Latency in ms, memory in MiB and shares in %, by what a query wants and what stands in."""
    rows = simulation(scenario, experts).set_index(["want", "redundancy", "variant"])
    times = {"p50": "p50", "p99.9": "p999", "from": "p999_low", "to": "p999_high"}
    sizes = {"MiB a server": "memory_server", "MiB in all": "memory"}
    shares = {"failed %": "share_failed", "right %": "effective_accuracy"}
    found = pd.DataFrame({name: 1e3 * rows[column] for name, column in times.items()})
    found = found.assign(**{name: rows[column] / 2**20 for name, column in sizes.items()}, forwards=rows.forwards)
    found["stood in %"] = 100 * (rows.share_decoded + rows.share_replicated)
    return found.assign(**{name: 100 * rows[column] for name, column in shares.items()}).round(2)


def tail_figure(scenario: str) -> Figure:
    """The p99.9 against the memory of all servers, with three and with eight experts."""
    rows = pd.concat([simulation(scenario, count) for count in (3, 8)])
    rows = rows[rows.p999 != float("inf")]
    wants = {"one": "one expert's answer a query", "all": "all experts' answers a query"}
    with figures.style():
        figure = Figure(figsize=(WIDTH, 0.9 + 2.6 * len(wants)))
        panels = figure.subplots(len(wants), 1, sharex=True)
        for axes, (want, title) in zip(panels, wants.items(), strict=True):
            for index, (kind, line) in enumerate(rows[rows.want == want].groupby("redundancy", sort=False)):
                line = line.sort_values(["experts", "extras", "memory"])
                high = line.p999_high.where(line.p999_high != float("inf"), line.p999)
                ends = [1e3 * (line.p999 - line.p999_low), 1e3 * (high - line.p999)]
                look = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 5, "capsize": 2}
                axes.errorbar(line.memory / 2**20, 1e3 * line.p999, ends, label=kind, linewidth=1.3, **look)
            axes.set(title=title, ylabel="p99.9 (ms, log scale)", xscale="log", yscale="log")
        panels[-1].set_xlabel("weights on all servers (MiB, log scale)")
        figures.legend_below(figure, panels[0], columns=3)
        figure.suptitle(f"{scenario}, 3 and 8 experts")
        return figure


def fine_tuned() -> pd.DataFrame:
    """The rows of the suite `fine-tuning`, with the way of training, the tasks, and the distance from the start."""
    rows = measured("fine-tuning")
    distance = pd.read_csv(RESULTS / "fine-tuning" / "distance.csv").groupby("experiment").body.mean()
    return rows.assign(
        way=[WAYS.get(expert) or TRAINED[len(json.loads(expert)["trainable"])] for expert in rows.expert],
        set=[" + ".join(json.loads(tasks)) for tasks in rows.tasks],
        distance=100 * rows.experiment.map(distance),
        accuracy=100 * rows.expert_accuracy,
    )


def own_accuracy(rows: pd.DataFrame) -> pd.DataFrame:
    """How right the experts of each way of training are, in %, over seeds."""
    own = rows.drop_duplicates(["way", "task", "seed", "set"]).groupby(["way", "seed", "task"], sort=False)
    return own.accuracy.first().groupby(["way", "task"], sort=False).agg(spread).unstack()


def nda_by_way(rows: pd.DataFrame) -> pd.DataFrame:
    """NDA in % over seeds, by tasks and way of training."""
    shown = rows[~rows.method.isin(["oracle", "none"])].assign(nda=100 * rows.nda)
    shown = shown.groupby(["set", "way", "decoder", "method", "seed"], sort=False).nda.mean()
    return shown.groupby(["set", "way", "decoder", "method"], sort=False).agg(spread).unstack([2, 3])


def nda_against(rows: pd.DataFrame, column: str, label: str) -> Figure:
    """NDA against another number, both ± deviation over seeds: a row for each set of tasks, a marker for each way."""
    rows = rows[~rows.method.isin(["none", "oracle"]) & rows[column].notna()]
    sets, decoders, ways = (list(rows[name].unique()) for name in ("set", "decoder", "way"))
    with figures.style():
        figure = Figure(figsize=(1.5 * WIDTH, 2.6 * len(sets)))
        panels = figure.subplots(len(sets), len(decoders), squeeze=False, sharex=True)
        keys = ["set", "decoder", "way", "method"]
        for (tasks, decoder, way, method), own in (
            rows.groupby([*keys, "seed"], sort=False)[[column, "nda"]].mean().groupby(keys, sort=False)
        ):
            mean, deviation = own.mean(), own.std().fillna(0)
            look = {"color": method_colour(method), "marker": MARKERS[ways.index(way)], "label": f"{method}, {way}"}
            axes = panels[sets.index(tasks)][decoders.index(decoder)]
            axes.errorbar(mean[column], 100 * mean.nda, 100 * deviation.nda, deviation[column], **look)
            axes.set(title=f"{tasks}, {decoder}", ylabel="NDA (%)")
        for axes in panels[-1]:
            axes.set_xlabel(label)
        figures.legend_below(figure, panels[0][0], columns=3)
    return figure
