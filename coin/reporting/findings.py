"""What the numbers say, in words made from the numbers: also where they speak against a method."""

import math
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from coin.reporting.comparison import REFERENCES, variant_names
from coin.reporting.plots import PAPER_NDA
from coin.reporting.summary import seed_means

Kind = Literal["holds", "fails", "worse", "note"]


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

    Variants are compared seed by seed, since the seeds share experts and calibration samples; a statement says in how
    many seeds it is true. A method is held against the strongest variant of plain averaging and of distillation.

    Args:
        frame: Rows of one or several ``results.csv``.
    """
    means = seed_means(frame).assign(name=lambda rows: variant_names(rows))
    found = {}
    for (experiment, erased, samples), part in means.groupby(["experiment", "erased", "samples_per_task"], sort=False):
        contenders = part[~part["method"].isin(REFERENCES)]
        group = _Group(part, tuple(dict.fromkeys([*contenders["decoder"], *part["decoder"]])))
        found[str(experiment), str(erased), int(str(samples))] = [
            *_paper(group),
            *_worse(group, "average", "plain averaging"),
            *_worse(group, "distillation", "distillation"),
            *_best(group),
            *_survivors(group),
            *_cautions(group),
        ]
    return found


def _paper(group: _Group) -> list[Finding]:
    """Hold the paper's two claims against the numbers: NDA of at least 97.5 %, and cheaper than distillation."""
    name = group.strongest(group.names("coin"), "linear")
    if name is None:
        return [Finding("note", "COIN was not measured with the linear decoder: the paper's claims are not tested.")]
    nda = group.nda(name, "linear")
    reached = int((nda >= PAPER_NDA).sum())
    holds = bool(nda.mean() >= PAPER_NDA)
    out = [
        Finding(
            "holds" if holds else "fails",
            f"Paper: COIN keeps at least {100 * PAPER_NDA:.1f} % NDA with the linear decoder. "
            f"{'True' if holds else 'Not true'} here: {name} has {_percent(nda)} "
            f"({reached} of {_seeds(len(nda))} reach it).",
        )
    ]
    distilled = group.names("distillation")
    if not distilled:
        return [*out, Finding("note", "Distillation was not measured: whether COIN is cheaper is not tested.")]
    ours, theirs = (_cost(group, names) for names in ([name], distilled))
    cheaper = ours[0] < theirs[0]
    text = f"{ours[0]:.1f} s against {theirs[0]:.1f} s"
    if ours[1] > 0 and theirs[1] > 0:
        text += f", {ours[1]:,.0f} against {theirs[1]:,.0f} forward passes of a sample"
    verdict = "True" if cheaper else "Not true"
    out.append(
        Finding("holds" if cheaper else "fails", f"Paper: COIN is cheaper than distillation. {verdict} here: {text}.")
    )
    return out


def _worse(group: _Group, baseline: str, called: str) -> list[Finding]:
    """Say, for each decoder without options, which methods do worse than the strongest variant of a baseline.

    In how many seeds stands behind a method where it is not all of them.
    """
    out = []
    for decoder in group.plain_decoders:
        reference = group.strongest(group.names(baseline), decoder)
        if reference is None:
            continue
        losers, compared = [], 0
        for name in group.names():
            if name in group.names(baseline):
                continue
            difference = (group.nda(name, decoder) - group.nda(reference, decoder)).dropna()
            compared += len(difference) > 0
            if difference.mean() < 0:
                worse = int((difference < 0).sum())
                some = "" if worse == len(difference) else f" (in {worse} of {_seeds(len(difference))})"
                losers.append(f"{name} by {-100 * difference.mean():.2f}{some}")
        if losers:
            which = f"{len(losers)} of {compared}" if compared > 1 else "the only other one"
            text = f"Than {called}, with the {decoder} decoder, {which}: {', '.join(losers)} points."
            out.append(Finding("worse", text))
        elif compared:
            out.append(Finding("note", f"With the {decoder} decoder no method does worse than {called}."))
    return out


def _best(group: _Group) -> list[Finding]:
    """Name the best method of each decoder, and the best pair of all."""
    tops = [(decoder, group.strongest(group.names(), decoder)) for decoder in group.decoders]
    measured = [(decoder, name, group.nda(name, decoder)) for decoder, name in tops if name is not None]
    if not measured:
        return []
    each = "; ".join(f"{decoder}: {name}, {_percent(nda)}" for decoder, name, nda in measured)
    return [Finding("note", f"Best method by decoder: {each}.")]


def _survivors(group: _Group) -> list[Finding]:
    """Say what the coded model adds to decoding from the survivors alone."""
    out = []
    for decoder in group.plain_decoders:
        none, best = group.nda("none", decoder), group.strongest(group.names(), decoder)
        if len(none) == 0 or best is None:
            continue
        gain = (group.nda(best, decoder) - none).dropna()
        if len(gain):
            kind: Kind = "note" if gain.mean() > 0 else "worse"
            out.append(
                Finding(
                    kind,
                    f"Without any coded model the survivors alone reach {_percent(none)} with the {decoder} decoder; "
                    f"the best coded model ({best}) adds {100 * gain.mean():.2f} points.",
                )
            )
    return out


def _cautions(group: _Group) -> list[Finding]:
    """Say what to be careful about: one seed, an oracle that is none, accuracies that are not defined."""
    out = []
    if group.means["seed"].nunique() == 1:
        out.append(Finding("note", "One seed only: there is no spread, and small differences mean nothing."))
    oracle = group.nda("oracle", "linear")
    if len(oracle) and bool(((oracle - 1).abs() > 1e-3).any()):
        out.append(
            Finding("fails", f"The oracle should have 100 % NDA and has {_percent(oracle)}: do not trust this table.")
        )
    if missing := sorted(set(group.means.loc[group.means["nda"].isna(), "name"])):
        out.append(Finding("fails", f"NDA is not defined (an expert is never right) for: {', '.join(missing)}."))
    return out


def _cost(group: _Group, names: list[str]) -> tuple[float, float]:
    """Return the mean seconds and passes of the cheapest of some variants."""
    rows = group.means[group.means["name"].isin(names) & (group.means["decoder"] == group.decoders[0])]
    costs = rows.groupby("name")[["calibration_seconds", "sample_passes"]].mean()
    cheapest = costs.sort_values("calibration_seconds").iloc[0]
    return float(cheapest["calibration_seconds"]), float(cheapest["sample_passes"])


def _percent(values: "pd.Series[float]") -> str:
    spread = values.std(ddof=1)
    shown = "" if math.isnan(spread) else f" ± {100 * spread:.2f}"
    return f"{100 * values.mean():.2f}{shown} %"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"
