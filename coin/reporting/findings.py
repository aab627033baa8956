"""Findings in words, generated from the numbers, including those against a method."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd
from scipy.special import stdtrit

from coin.coding.decoder_config import REPLICA
from coin.reporting.figures import PAPER_NDA
from coin.reporting.summary import ITERATIVE, REFERENCES, TRAINED, seed_means, variant_names
from coin.reporting.tables import BEST, percent, seconds

FEWEST_SEEDS = 3
"""The fewest seeds for which a difference is tested for significance."""
_MOST = 5
CLOSED_FORM, STEPS, BASELINE, FOREIGN, REPLICAS, FLOOR = (
    "best closed form", "best in a few steps", "fair baseline: best trained", "best of your own",
    "best compressed experts", "floor: no coded model",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A variant of a `method`, whatever its label, with one decoder: its NDA by seed, its mean seconds over seeds."""

    name: str
    method: str
    decoder: str
    nda: "pd.Series[float]"
    seconds: float

    @property
    def text(self) -> str:
        """The mean NDA ± spread over seeds, in %."""
        return percent(self.nda.mean(), self.nda.std(ddof=1), digits=1) + " %"

    @property
    def role(self) -> str:
        """What it is compared as; nothing for the oracle."""
        if self.method in REFERENCES:
            return FLOOR if self.method == "none" else ""
        if self.decoder == REPLICA:
            return REPLICAS
        if self.method == "user_method":  # whatever it is
            return FOREIGN
        return BASELINE if self.method in TRAINED else STEPS if self.method in ITERATIVE else CLOSED_FORM


@dataclass(frozen=True)
class Findings:
    """What one experiment says where one expert is lost, at the P that most methods have.

    Args:
        headline: The finding in one sentence.
        roles: The best of each role with its best decoder, on the test sets.
        significant_differences: Which differences are clear, five at most, or between whom none is.
        cautions: What to be careful about.
        entries: Everything that was measured.
    """

    headline: str
    roles: dict[str, Entry]
    significant_differences: tuple[str, ...]
    cautions: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def best(self) -> Entry | None:
        """The best coded model, with its decoder."""
        return _strongest(entry for role, entry in self.roles.items() if role not in (FLOOR, REPLICAS))


def findings(frame: pd.DataFrame, kinds: Mapping[str, str] | None = None) -> Findings:
    """Return what the rows of one experiment's ``results.csv`` say; its variants are compared seed by seed.

    `kinds` are the methods' own names by label; a label that is not among them says by its beginning what it is.
    """
    means = seed_means(frame).assign(name=lambda rows: variant_names(rows))
    erased = min(means["erased"], key=lambda size: int(size.partition(" ")[0]))
    methods = means.groupby("samples_per_task")["name"].nunique()
    samples = methods[methods == methods.max()].index.max()
    lost = means[means["erased"] == erased]
    means = lost[lost["samples_per_task"] == samples]
    others = lost[~lost["name"].isin(means["name"]) & ~lost["method"].isin(REFERENCES)]
    entries = []
    for (name, decoder), rows in means.groupby(["name", "decoder"], sort=False):
        took = float((rows["merge_seconds"] + rows["decoder_seconds"]).mean())
        label = str(rows["method"].iloc[0])
        begins = (known for known in (*TRAINED, *ITERATIVE) if label.startswith(known))
        method = (kinds or {}).get(label) or next(begins, label)
        entries.append(Entry(str(name), method, str(decoder), rows.set_index("seed")["nda"], took))
    best = {role: _strongest(entries, role=role) for role in (CLOSED_FORM, STEPS, BASELINE, FOREIGN, REPLICAS, FLOOR)}
    roles = {role: entry for role, entry in best.items() if entry is not None}
    cautions = _cautions(means)
    if own := [f"{name} (P = {p})" for name, p in others.groupby("name", sort=False)["samples_per_task"].max().items()]:
        cautions.append(f"Not compared with the others at P = {samples}, its P differs: {', '.join(own)}.")
    said = _significant_differences(entries, roles)
    return Findings(_headline(erased, roles, entries), roles, tuple(said[:_MOST]), tuple(cautions), tuple(entries))


def paired_difference(one: Entry, other: Entry) -> tuple[float, float, int | None]:
    """Return by how much one's NDA is above another's: the mean over seeds, the spread, and the sign.

    The sign is 0 where the 95 % confidence interval of a paired t-test does not exclude zero, and None where the two
    share fewer than `FEWEST_SEEDS`.
    """
    gains = (one.nda - other.nda).dropna()
    mean, spread = float(gains.mean()), float(gains.std(ddof=1))
    if len(gains) < FEWEST_SEEDS:
        return mean, spread, None
    half = float(stdtrit(len(gains) - 1, 0.975)) * spread / math.sqrt(len(gains))
    return mean, spread, 0 if abs(mean) <= max(half, 1e-12) else int(math.copysign(1, mean))


def paired_differences(found: Findings, decoder: str) -> pd.DataFrame:
    """Return differences in NDA with one decoder in points, ± spread over seeds; those that are clear carry `BEST`.

    As text: a line per method, minus each of a few: the survivors alone, averaging, COIN, the best trained.
    """
    entries = [entry for entry in found.entries if entry.decoder == decoder and entry.method != "oracle"]
    against = [_strongest(entries, method=method) for method in ("none", "average", "coin")]
    against.append(_strongest(entries, role=BASELINE))
    lines = []
    for entry in entries:
        line = {"method": entry.name}
        for other in filter(None, against):
            mean, spread, sign = paired_difference(entry, other)
            line[f"minus {other.name}"] = "–" if entry is other else percent(mean, spread, plus="+") + BEST * bool(sign)
        lines.append(line)
    return pd.DataFrame(lines)


def _headline(erased: str, roles: dict[str, Entry], entries: list[Entry]) -> str:
    text = f"When {erased.replace('1 of', 'one of')} experts is lost, "
    first, *others = roles or [FLOOR]
    if first == FLOOR:
        parts = [f"the survivors alone keep {each.text} of its accuracy" for each in roles.values()]
        if any(entry.nda.isna().any() for entry in entries):
            parts.append("NDA is not defined, since an expert is never right")
        if all(entry.method in REFERENCES for entry in entries):
            parts.append("there is no coded model")
        return f"{text}{'; '.join(parts)}."
    best = roles[first]
    text += f"{best.name}, the {first.rpartition(': ')[2]}, keeps {best.text} of its accuracy "
    text += f"with the {best.decoder} decoder"
    words, relation = {None: "against", 1: "above", 0: "not clearly apart from", -1: "below"}, ""
    for place, role in enumerate(others):
        other = roles[role]
        same, relation = relation, words[paired_difference(best, other)[2]]
        what = {BASELINE: ", the best trained method", REPLICAS: ", compressed experts"}.get(role, "")
        named = f"for {other.name}{what}"
        said = f"{other.text} {'without a coded model' if role == FLOOR else named}"
        text += (", and " if place else ", ") + (said if relation == same else f"{relation} {said}")
    return f"{text}."


def _significant_differences(entries: list[Entry], roles: dict[str, Entry]) -> list[str]:
    """Return differences that are clear, the most telling first; where none is, what was compared."""
    best = roles.get(CLOSED_FORM) or _strongest(entry for role, entry in roles.items() if role not in (FLOOR, REPLICAS))
    if best is None:
        return []
    trained = roles.get(BASELINE)
    took = f", at {seconds(best.seconds)} s against {seconds(trained.seconds)} s" if trained else ""
    pairs: list[tuple[Entry | None, Entry | None, str]] = [
        (best, trained, took),
        (best, roles.get(FLOOR), ", without a coded model"),
        (best, _strongest(entries, name=best.name, decoder="linear"), ": the decoder alone"),
    ]
    for decoder in dict.fromkeys(("linear", best.decoder)):
        coin, average = (_strongest(entries, method=method, decoder=decoder) for method in ("coin", "average"))
        pairs.append((coin, average, ""))
    if coin := _strongest(entries, method="coin", decoder="linear"):
        line = Entry(f"the {100 * PAPER_NDA:.1f} %", "", "paper, in some cases", coin.nda * 0 + PAPER_NDA, 0.0)
        pairs.append((coin, line, ""))
    out, level = [], []
    for one, other, what in pairs:
        if one is None or other is None or one is other:
            continue
        mean, spread, sign = paired_difference(one, other)
        first, second = (f"{entry.name} ({entry.decoder})" for entry in (one, other))
        if sign:
            side = "above" if sign > 0 else "below"
            out.append(f"{first} is {percent(abs(mean), spread)} points {side} {second}{what}.")
        elif sign == 0:
            level.append(f"{first} against {second}")
    return out or ([f"None of these differences is clear: {', '.join(dict.fromkeys(level))}."] if level else [])


def _cautions(means: pd.DataFrame) -> list[str]:
    out = []
    if (seeds := means["seed"].nunique()) < FEWEST_SEEDS:
        few = "One seed" if seeds == 1 else "Two seeds"
        out.append(f"{few} only: whether differences are significant is tested from three seeds on.")
    oracle = means[(means["method"] == "oracle") & (means["decoder"] == "linear")]
    if bool(((oracle["nda"] - 1).abs() > 1e-3).any()):
        out.append(f"The oracle should have 100 % NDA and has {percent(oracle['nda'].mean())} %: do not trust this.")
    if missing := sorted(set(means.loc[means["nda"].isna(), "name"])):
        out.append(f"NDA is not defined (an expert is never right) for: {', '.join(missing)}.")
    return out


def _strongest(entries: Iterable[Entry], **wanted: str) -> Entry | None:
    """Return the entry of the largest mean NDA among those that have these attributes."""
    fit = [entry for entry in entries if all(getattr(entry, name) == value for name, value in wanted.items())]
    measured = [entry for entry in fit if not entry.nda.isna().any()]
    return max(measured, key=lambda entry: float(entry.nda.mean()), default=None)
