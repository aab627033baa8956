"""What the numbers say, in words made from the numbers: also where they speak against a method."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from coin.reporting.comparison import REFERENCES, decoders_of, variant_names
from coin.reporting.series import PAPER_NDA
from coin.reporting.summary import seed_means

Kind = Literal["holds", "fails", "worse", "note"]
_FEWEST = 3
"""With fewer seeds no difference is told from chance."""
_NAMED = 3
"""More methods that are level with the best one are counted, not named."""


@dataclass(frozen=True)
class Finding:
    """One sentence: a claim that ``holds`` or ``fails`` here, a method that is ``worse`` than a baseline, or a note."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class _Group:
    """The means over tasks of one experiment at one size of erasure and one P, by variant, decoder and seed."""

    means: pd.DataFrame
    decoders: tuple[str, ...]

    @property
    def plain_decoders(self) -> tuple[str, ...]:
        """The decoders without options, whose names have no suffix; all of them where there are none."""
        return tuple(decoder for decoder in self.decoders if "-" not in decoder) or self.decoders

    def nda(self, name: str, decoder: str) -> "pd.Series[float]":
        """Return NDA by seed."""
        chosen = (self.means["name"] == name) & (self.means["decoder"] == decoder)
        return self.means[chosen].set_index("seed")["nda"].dropna()

    def gain(self, name: str, reference: str, decoder: str) -> "pd.Series[float]":
        """Return by how much the NDA of one variant is above that of another, by seed, where both were measured."""
        return (self.nda(name, decoder) - self.nda(reference, decoder)).dropna()

    def merging(self, name: str) -> pd.DataFrame:
        """Return what making a variant's coded model took, by seed: ``merge_seconds`` and ``merge_passes``."""
        rows = self.means[self.means["name"] == name].drop_duplicates("seed").set_index("seed")
        return rows[["merge_seconds", "merge_passes"]]

    def names(self, method: str | None = None) -> list[str]:
        """Return the variants of a method, of all contenders by default."""
        own = self.means["method"]
        # Labels that tell variants of a method apart begin with its name.
        chosen = ~own.isin(REFERENCES) if method is None else (own == method) | own.str.startswith(f"{method}-")
        return list(dict.fromkeys(self.means.loc[chosen, "name"]))

    def strongest(self, names: list[str], decoder: str) -> str | None:
        """Return the variant with the largest mean NDA, None where none was measured with this decoder."""
        measured = {name: self.nda(name, decoder).mean() for name in names if len(self.nda(name, decoder))}
        return max(measured, key=lambda name: measured[name]) if measured else None


def findings(frame: pd.DataFrame) -> dict[tuple[str, str, int], list[Finding]]:
    """Return what the numbers say, by experiment, size of erasure (``1 of 2``) and P.

    Variants are compared seed by seed, since the seeds share experts and calibration samples, and only a difference
    that is clear of the seeds' spread counts; see `_clear`. A method is held against the strongest variant of plain
    averaging and of distillation.

    Args:
        frame: Rows of one or several ``results.csv``.
    """
    means = seed_means(frame).assign(name=lambda rows: variant_names(rows))
    found = {}
    for (experiment, erased, samples), part in means.groupby(["experiment", "erased", "samples_per_task"], sort=False):
        group = _Group(part, tuple(decoders_of(part)))
        rows = frame[(frame["experiment"] == experiment) & (frame["samples_per_task"] == samples)]
        found[str(experiment), str(erased), int(str(samples))] = [
            *_paper(group),
            *_worse(group, "average", "plain averaging"),
            *_worse(group, "distillation", "distillation"),
            *_best(group),
            *_survivors(group),
            *_taken(rows),
            *_cautions(group),
        ]
    return found


def _clear(difference: "pd.Series[float]") -> int:
    """Return the sign of a paired difference, by seed, where it is clear of the seeds' spread, else 0.

    It is where the mean is more than two standard errors (sample standard deviation over √seeds) from zero, over at
    least `_FEWEST` seeds: one or two cannot tell.
    """
    values = difference.dropna()
    if len(values) < _FEWEST or abs(values.mean()) <= 2 * _error(values):
        return 0
    return 1 if values.mean() > 0 else -1


def _paper(group: _Group) -> list[Finding]:
    """Put the paper's two claims beside the numbers: NDA above 97.5 % in some cases, and cheaper than distillation."""
    name = group.strongest(group.names("coin"), "linear")
    if name is None:
        return [Finding("note", "COIN was not measured with the linear decoder: the paper's claims are not tested.")]
    nda = group.nda(name, "linear")
    above = int((nda > PAPER_NDA).sum())
    out = [
        Finding(
            "note",
            f"Paper: NDA above {100 * PAPER_NDA:.1f} % in some cases. Here: {name} has {_percent(nda)} with the linear "
            f"decoder ({above} of {_seeds(len(nda))} above).",
        )
    ]
    if not group.names("distillation"):
        return [*out, Finding("note", "Distillation was not measured: whether COIN is cheaper is not tested.")]
    costs = [group.merging(each) for each in group.names("distillation")]
    ours, theirs = group.merging(name), min(costs, key=lambda cost: float(cost["merge_seconds"].mean()))
    sign = _clear(ours["merge_seconds"] - theirs["merge_seconds"])
    text = " and ".join(
        f"{ours[column].mean():,.{digits}f} against {theirs[column].mean():,.{digits}f} {unit}"
        for column, digits, unit in (("merge_seconds", 1, "s"), ("merge_passes", 0, "forward passes of a sample"))
    )
    kinds: dict[int, tuple[Kind, str]] = {-1: ("holds", "True"), 0: ("note", "Not decided"), 1: ("fails", "Not true")}
    kind, verdict = kinds[sign]
    cost = f"Paper: COIN is cheaper than distillation. {verdict} here: making the coded model takes {text}."
    return [*out, Finding(kind, cost)]


def _worse(group: _Group, baseline: str, called: str) -> list[Finding]:
    """Say, for each decoder without options, which methods are clearly below the strongest variant of a baseline."""
    out = []
    for decoder in group.plain_decoders:
        reference = group.strongest(group.names(baseline), decoder)
        others = [name for name in group.names() if name not in group.names(baseline)]
        paired = {} if reference is None else {name: group.gain(name, reference, decoder) for name in others}
        compared = {name: gain for name, gain in paired.items() if len(gain) >= _FEWEST}
        losers = [f"{name} by {_points(-gain)}" for name, gain in compared.items() if _clear(gain) < 0]
        if losers:
            which = f"{len(losers)} of {len(compared)}" if len(compared) > 1 else "the only other one"
            text = f"Than {called}, with the {decoder} decoder, {which}: {', '.join(losers)} points."
            out.append(Finding("worse", text))
        elif compared:
            out.append(Finding("note", f"With the {decoder} decoder no method does clearly worse than {called}."))
    return out


def _best(group: _Group) -> list[Finding]:
    """Name the method of the largest mean for each decoder, with those that it does not clearly beat."""
    each = []
    for decoder in group.decoders:
        best = group.strongest(group.names(), decoder)
        if best is None:
            continue
        gains = {name: group.gain(best, name, decoder) for name in group.names() if name != best}
        level = [name for name, gain in gains.items() if len(gain) >= _FEWEST and _clear(gain) == 0]
        more = f" and {len(level) - _NAMED} more" if len(level) > _NAMED else ""
        beside = f" (not clearly above {', '.join(level[:_NAMED])}{more})" if level else ""
        each.append(f"{decoder}: {best}, {_percent(group.nda(best, decoder))}{beside}")
    return [Finding("note", f"Largest mean by decoder: {'; '.join(each)}.")] if each else []


def _survivors(group: _Group) -> list[Finding]:
    """Say what the coded model adds to decoding from the survivors alone."""
    out = []
    for decoder in group.plain_decoders:
        none, best = group.nda("none", decoder), group.strongest(group.names(), decoder)
        gain = none if best is None else group.gain(best, "none", decoder)
        if best is None or len(gain) == 0:
            continue
        unclear = ", within the seeds' spread" if len(gain) >= _FEWEST and _clear(gain) == 0 else ""
        text = (
            f"Without any coded model the survivors alone reach {_percent(none)} with the {decoder} decoder; "
            f"the best coded model ({best}) adds {_points(gain)} points{unclear}."
        )
        out.append(Finding("worse" if _clear(gain) < 0 else "note", text))
    return out


def _taken(rows: pd.DataFrame) -> list[Finding]:
    """Say which BatchNorm policy the methods took that were free to choose."""
    chose = rows[rows["batchnorm"].str.contains(":")].drop_duplicates(["method", "seed"])
    counts: Any = chose.groupby(["batchnorm", "method"], sort=False).size().items()
    said = [f"{policy.partition(':')[2]} for {name} in {_seeds(count)}" for (policy, name), count in counts]
    return [Finding("note", f"BatchNorm policy that auto took: {', '.join(said)}.")] if said else []


def _cautions(group: _Group) -> list[Finding]:
    """Say what to be careful about: few seeds, an oracle that is none, accuracies that are not defined."""
    out = []
    if (seeds := group.means["seed"].nunique()) < _FEWEST:
        few = "One seed" if seeds == 1 else "Two seeds"
        out.append(Finding("note", f"{few} only: one or two seeds cannot tell a difference from chance."))
    oracle = group.nda("oracle", "linear")
    if len(oracle) and bool(((oracle - 1).abs() > 1e-3).any()):
        out.append(
            Finding("fails", f"The oracle should have 100 % NDA and has {_percent(oracle)}: do not trust this table.")
        )
    if missing := sorted(set(group.means.loc[group.means["nda"].isna(), "name"])):
        out.append(Finding("fails", f"NDA is not defined (an expert is never right) for: {', '.join(missing)}."))
    return out


def _percent(values: "pd.Series[float]") -> str:
    spread = values.std(ddof=1)
    shown = "" if math.isnan(spread) else f" ± {100 * spread:.2f}"
    return f"{100 * values.mean():.2f}{shown} %"


def _points(gain: "pd.Series[float]") -> str:
    """Return a mean difference in points with its standard error, which one seed has not."""
    return f"{100 * gain.mean():.2f}" + (f" ± {100 * _error(gain):.2f}" if len(gain) > 1 else "")


def _error(values: "pd.Series[float]") -> float:
    """Return the standard error of the mean over seeds."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"
