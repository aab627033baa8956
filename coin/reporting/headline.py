"""What an experiment says in a sentence, and how its methods differ, paired by seed."""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd
from scipy.stats import ttest_rel

from coin.coding.decoder_config import REPLICA
from coin.reporting.summary import REFERENCES, TRAINED, seed_means, variant_names
from coin.reporting.tables import BEST
from coin.reporting.text import percent

CODED, FLOOR = "", "without a coded model"
BASELINE, COPIES = "for {}, the best trained method", "for {}, compressed experts"
"""What an entry is compared as, and how the headline says it."""
LEVEL = 0.05  # a difference with a smaller p-value is clear


@dataclass(frozen=True)
class Entry:
    """A variant of a method with its best decoder: its role in comparisons, and its NDA by seed, mean over tasks."""

    name: str
    decoder: str
    role: str
    nda: "pd.Series[float]"

    @property
    def text(self) -> str:
        """What is kept: the mean NDA, of which no more than all is kept, ± spread over seeds, in %."""
        return percent(min(self.nda.mean(), 1.0), self.nda.std(ddof=1), digits=1) + " %"


def entries(frame: pd.DataFrame, kinds: Mapping[str, str]) -> list[Entry]:
    """Return what the rows of one experiment compare, the best first: each variant with its best decoder.

    Counted are the smallest erasures, at the P that most variants have; the oracle and what is not defined are left
    out. `kinds` are the methods' own names by label; a label that is not among them says by its beginning what it is.
    """
    best: dict[str, Entry] = {}
    for entry in _every_entry(frame, kinds):
        if entry.name not in best or entry.nda.mean() > best[entry.name].nda.mean():
            best[entry.name] = entry
    return sorted(best.values(), key=lambda entry: -entry.nda.mean())


def entry_of(frame: pd.DataFrame, kinds: Mapping[str, str], name: str, decoder: str) -> Entry | None:
    """Return a variant with this decoder, counted as `entries` does; None where it is not among them."""
    pairs = ((each.name, each.decoder, each) for each in _every_entry(frame, kinds))
    return next((entry for *pair, entry in pairs if pair == [name, decoder]), None)


def _every_entry(frame: pd.DataFrame, kinds: Mapping[str, str]) -> Iterator[Entry]:
    """Yield every variant with every decoder."""
    means = seed_means(frame).assign(name=variant_names)
    means = means[means["erased"] == min(means["erased"], key=lambda size: int(size.partition(" ")[0]))]
    variants = means.groupby("samples_per_task")["name"].nunique()
    means = means[means["samples_per_task"] == variants[variants == variants.max()].index.max()]
    for (name, method, decoder), rows in means.groupby(["name", "method", "decoder"], sort=False):
        kind = kinds.get(str(method), str(method))
        nda = rows.set_index("seed")["nda"]
        role = BASELINE if kind.startswith(TRAINED) else FLOOR if kind == REFERENCES[0] else CODED
        if kind != REFERENCES[1] and not nda.isna().any():
            yield Entry(str(name), str(decoder), COPIES if decoder == REPLICA else role, nda)


def best_coded(found: list[Entry]) -> Entry | None:
    """Return the best closed form, or the best trained coded model where there is none."""
    return next((each for role in (CODED, BASELINE) for each in found if each.role == role), None)


def headline(found: list[Entry], num_experts: int, recommended: Entry | None = None) -> str:
    """Return in one sentence what the recommended stand-in keeps, beside training, compressed experts and no coded one.

    Without a recommendation it is the best coded model. With two seeds or more the sentence says which of these are
    clearly apart (paired t-test, `LEVEL`).
    """
    text = f"When one of {num_experts} experts is lost, "
    best = recommended or best_coded(found)
    if best is None:
        kept = [f"{'the survivors alone' if each.role == FLOOR else each.name} keep {each.text}" for each in found]
        return f"{text}{' and '.join(kept) or 'nothing keeps'} of its accuracy; there is no coded model."
    keeps = "the survivors alone keep" if best.role == FLOOR else f"{best.name} keeps"
    decoder = "" if best.role == COPIES else f" with the {best.decoder} decoder"
    text += f"{keeps} {best.text} of its accuracy{decoder}"
    said, before = [], ""
    for role in (BASELINE, COPIES, FLOOR):
        if other := next((each for each in found if each.role == role and each.name != best.name), None):
            mean, _, p = difference(best, other)
            side = "above" if mean > 0 else "below"
            keep_all = best.nda.mean() >= 1 and other.nda.mean() >= 1  # shown as one number: none keeps more than all
            untested = math.isnan(p) or keep_all
            now = "against" if untested else side if p < LEVEL else "not clearly apart from"
            said.append(f"{'' if now == before else f'{now} '}{other.text} {role.format(other.name)}")
            before = now
    return ", ".join([text, *said[:-1], *(f"and {last}" if len(said) > 1 else last for last in said[-1:])]) + "."


def difference(one: Entry, other: Entry) -> tuple[float, float, float]:
    """Return by how much one's NDA is above another's, paired by seed: mean, spread, p-value (NaN for one seed)."""
    gains = (one.nda - other.nda).dropna()
    p = math.nan if len(gains) < 2 else 1.0
    if len(gains) > 1 and gains.abs().max() > 1e-12:
        with warnings.catch_warnings():  # the same difference in all seeds: the spread is rounding, and p 0
            warnings.simplefilter("ignore", RuntimeWarning)
            p = float(ttest_rel(one.nda[gains.index], other.nda[gains.index]).pvalue)
    return float(gains.mean()), float(gains.std(ddof=1)), p


def differences(found: list[Entry]) -> pd.DataFrame:
    """Return a line per method, its NDA minus the best coded model's in points; empty where there is one seed."""
    best, lines = best_coded(found), []
    for entry in found:
        if best is None or entry is best or math.isnan((gain := difference(entry, best))[2]):
            continue
        mean, spread, p = gain
        text = percent(mean, spread, plus="+") + BEST * (p < LEVEL)
        lines.append({"method": entry.name, "decoder": entry.decoder, f"minus {best.name}": text, "p": f"{p:.2g}"})
    return pd.DataFrame(lines)


def cautions(frame: pd.DataFrame) -> list[str]:
    """Return what to be careful about in the rows of one experiment."""
    means = seed_means(frame).assign(name=variant_names)
    out = ["One seed only: there is no spread, and no difference is tested."] if means["seed"].nunique() < 2 else []
    oracle = means.loc[(means["method"] == "oracle") & (means["decoder"] == "linear"), "nda"]
    if bool(((oracle - 1).abs() > 1e-3).any()):
        out.append(f"The oracle should have 100 % NDA and has {percent(oracle.mean())} %: do not trust this.")
    if missing := sorted(set(means.loc[means["nda"].isna(), "name"])):
        out.append(f"NDA is not defined (an expert is never right) for: {', '.join(missing)}.")
    return out
