"""What tables and reports show: methods side by side, with one name each and the best cells marked."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from coin.reporting.results import asked_policy

REFERENCES = ("none", "oracle")
"""Methods that are no contenders: the survivors alone, and the exact sum of the experts."""
_KEEPING = ("refit", "distillation", "readout_distillation")
"""Methods whose one BatchNorm policy is ``keep``; the others' default is ``auto``. Labels begin with the name."""


@dataclass(frozen=True)
class Cell:
    """A number over seeds: its mean, its sample standard deviation (NaN for one seed), and whether it is the best."""

    mean: float
    spread: float
    best: bool = False


@dataclass(frozen=True)
class Line:
    """One method's variant at one P: NDA by decoder, the residual, and what was spent, as means over seeds.

    ``merge_seconds`` and ``merge_passes`` made the coded model. ``decoder_seconds`` and ``decoder_passes`` fitted the
    dearest of the decoders: the linear one costs nothing.
    """

    name: str
    method: str
    batchnorm: str
    samples_per_task: int
    cells: Mapping[str, Cell]
    residual: float
    merge_seconds: float
    merge_passes: float
    decoder_seconds: float
    decoder_passes: float

    @property
    def is_reference(self) -> bool:
        """Whether this is ``none`` or ``oracle``, which stand beside the methods rather than among them."""
        return self.method in REFERENCES


@dataclass(frozen=True)
class Comparison:
    """All variants of one experiment at one size of erasure, contenders first, references last."""

    experiment: str
    erased: str
    decoders: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def samples(self) -> tuple[int, ...]:
        """The values of P that occur, in increasing order."""
        return tuple(sorted({line.samples_per_task for line in self.lines}))

    @property
    def policies(self) -> tuple[str, ...]:
        """The BatchNorm policies that occur, in order of appearance."""
        return tuple(dict.fromkeys(line.batchnorm for line in self.lines if line.batchnorm))


def over_tasks(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of means over tasks, each lost alone."""
    return summary[(summary["task"] == "mean") & summary["erased"].str.startswith("1 of ")]


def largest_samples(rows: pd.DataFrame) -> pd.DataFrame:
    """Return each variant's rows at its largest P: one point per variant, whatever P the others had."""
    variant = ["experiment", "method", "batchnorm"]
    return rows[rows["samples_per_task"] == rows.groupby(variant)["samples_per_task"].transform("max")]


def decoders_of(rows: pd.DataFrame) -> list[str]:
    """Return the decoders in order of appearance among the methods; those of the references alone come last."""
    contenders = rows[~rows["method"].isin(REFERENCES)]
    return list(dict.fromkeys([*contenders["decoder"], *rows["decoder"]]))


def variant_names(frame: pd.DataFrame) -> "pd.Series[str]":
    """Return one name per row that tells a method's variants apart.

    A name depends on the method's own options alone: its label, and the BatchNorm policy that was asked for where that
    is not the method's default (``coin (recalibrate)``). Where a method was read out through several sets of coded
    models, the set follows in brackets (``coin[0+1]``).

    Args:
        frame: Rows of results or of a summary.
    """
    base = _policy_names(frame)
    # Several sets count as variants only where they read out the same loss; R = 2 uses other sets for other sizes.
    same = ["experiment", "method", "batchnorm", "decoder", "erased", "task", "samples_per_task"]
    several = frame.groupby(same, sort=False)["code_row"].transform("nunique") > 1
    ambiguous = set(frame.loc[several, "method"])
    return pd.Series(
        [
            f"{name}[{code_row}]" if method in ambiguous else name
            for name, method, code_row in zip(base, frame["method"], frame["code_row"], strict=True)
        ],
        index=frame.index,
        dtype=object,
    )


def layer_names(layers: pd.DataFrame) -> "pd.Series[str]":
    """Return one name per row of ``layers.csv``: as `variant_names`, with the row of the code where there are several.

    Args:
        layers: What `coin.reporting.read_layers` returns.
    """
    base = _policy_names(layers)
    several = layers["code_row"].nunique() > 1
    names = [f"{name}[{row}]" if several else name for name, row in zip(base, layers["code_row"], strict=True)]
    return pd.Series(names, index=layers.index, dtype=object)


def _policy_names(frame: pd.DataFrame) -> list[str]:
    """Return one name per row that tells methods and their BatchNorm policies apart."""
    names = []
    for method, policy in zip(frame["method"], frame["batchnorm"].map(asked_policy), strict=True):
        default = policy in ("", "auto") or (policy == "keep" and method.startswith(_KEEPING))
        names.append(method if default else f"{method} ({policy})")
    return names


def comparisons(summary: pd.DataFrame) -> list[Comparison]:
    """Return one comparison per experiment and size of erasure, in order of appearance.

    A cell is the best where its mean equals the largest of its decoder's column (and P) to the two decimals of a
    percentage that tables print. The references never are.

    Args:
        summary: What `coin.reporting.summarise` returns; only its means over tasks are read.
    """
    means = summary[summary["task"] == "mean"].assign(name=variant_names(summary))
    return [
        _comparison(str(experiment), str(erased), group)
        for (experiment, erased), group in means.groupby(["experiment", "erased"], sort=False)
    ]


def expert_accuracies(summary: pd.DataFrame) -> pd.DataFrame:
    """Return each task's own expert's accuracy: ``experiment, task, seeds, mean, spread``, one row per task."""
    tasks = summary[summary["task"] != "mean"].drop_duplicates(["experiment", "task"])
    renamed = tasks.rename(columns={"expert_accuracy_mean": "mean", "expert_accuracy_std": "spread"})
    return renamed[["experiment", "task", "seeds", "mean", "spread"]].reset_index(drop=True)


def percent(cell: Cell, sign: str = " ± ") -> str:
    """Return ``98.02 ± 0.31`` in percent, without the spread where there is none, ``–`` where there is no number."""
    if math.isnan(cell.mean):
        return "–"
    spread = "" if math.isnan(cell.spread) else f"{sign}{100 * cell.spread:.2f}"
    return f"{100 * cell.mean:.2f}{spread}"


def short(value: float) -> str:
    """Return a count in at most five characters: ``840``, ``8.4k``, ``57.6k``, ``1.2M``; ``–`` for NaN."""
    if math.isnan(value):
        return "–"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}".removesuffix(".0") + unit
    return f"{value:.0f}"


def heading(name: str, width: int = 14, marks: str = "-") -> str:
    """Return a name as a heading: a long one on several lines, each broken behind one of these marks."""
    lines = [""]
    for part in re.findall(rf"[^{marks}]*[{marks}]|[^{marks}]+", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def seconds(value: float) -> str:
    """Return a duration in seconds with about three digits, ``–`` for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _comparison(experiment: str, erased: str, means: pd.DataFrame) -> Comparison:
    contenders = means[~means["method"].isin(REFERENCES)]
    best = contenders.groupby(["decoder", "samples_per_task"])["nda_mean"].max().round(4).to_dict()
    lines = []
    order = {name: place for place, name in enumerate(dict.fromkeys(means["name"]))}
    means = means.sort_values("samples_per_task", kind="stable")
    means = means.sort_values("name", kind="stable", key=lambda names: names.map(order))
    for (name, _), group in means.groupby(["name", "samples_per_task"], sort=False):
        first = group.iloc[0]
        cells = {}
        for _, row in group.iterrows():
            top = best.get((row["decoder"], row["samples_per_task"]), math.nan)
            is_best = row["method"] not in REFERENCES and round(row["nda_mean"], 4) == top
            cells[row["decoder"]] = Cell(row["nda_mean"], row["nda_std"], is_best)
        lines.append(
            Line(
                name=str(name),
                method=first["method"],
                batchnorm=first["batchnorm"],
                samples_per_task=int(first["samples_per_task"]),
                cells=cells,
                residual=first["residual_mean"],
                merge_seconds=first["merge_seconds_mean"],
                merge_passes=first["merge_passes_mean"],
                decoder_seconds=group["decoder_seconds_mean"].max(),
                decoder_passes=group["decoder_passes_mean"].max(),
            )
        )
    lines.sort(key=lambda line: line.is_reference)
    return Comparison(experiment, erased, tuple(decoders_of(means)), tuple(lines))
