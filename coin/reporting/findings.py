"""What the numbers say, in words made from the numbers: also where they speak against a method."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd
from scipy import stats

from coin.reporting.figures import PAPER_NDA
from coin.reporting.summary import REFERENCES, TRAINED, seed_means, variant_names
from coin.reporting.tables import BEST, percent, seconds

FEWEST_SEEDS = 3
"""With fewer seeds no difference is told from chance."""
_MOST = 5


@dataclass(frozen=True)
class Entry:
    """A method's variant with one decoder: its NDA by seed, and what it took as a mean over seeds."""

    name: str
    method: str
    decoder: str
    nda: "pd.Series[float]"
    seconds: float
    passes: float

    @property
    def text(self) -> str:
        """The mean NDA ± spread over seeds, in %."""
        return percent(self.nda.mean(), self.nda.std(ddof=1), digits=1) + " %"

    @property
    def is_trained(self) -> bool:
        """Whether the coded model was trained by gradient descent."""
        return self.method.startswith(TRAINED)


@dataclass(frozen=True)
class Findings:
    """What one experiment says where one expert is lost, at the P that most methods have.

    Args:
        headline: The finding in one sentence.
        closed_form: The best method that is not trained.
        trained: The best trained one: the fair baseline.
        floor: The survivors alone, without a coded model.
        beyond_spread: What is clear of the seeds' spread, five at most.
        cautions: What to be careful about.
        entries: Everything that was measured, by variant and decoder.
    """

    headline: str
    closed_form: Entry | None
    trained: Entry | None
    floor: Entry | None
    beyond_spread: tuple[str, ...]
    cautions: tuple[str, ...]
    entries: dict[tuple[str, str], Entry]

    @property
    def best(self) -> Entry | None:
        """The best coded model, with its decoder."""
        return _strongest(entry for entry in (self.closed_form, self.trained) if entry is not None)


def findings(frame: pd.DataFrame) -> Findings:
    """Return what the rows of one experiment say.

    Variants are compared seed by seed, since the seeds share experts and calibration samples. The best are the best on
    the test sets.

    Args:
        frame: Rows of one experiment's ``results.csv``, of one or several seeds.
    """
    means = seed_means(frame).assign(name=lambda rows: variant_names(rows))
    erased = min(means["erased"], key=lambda size: int(size.partition(" ")[0]))
    methods = means.groupby("samples_per_task")["name"].nunique()
    samples = methods[methods == methods.max()].index.max()
    means = means[(means["erased"] == erased) & (means["samples_per_task"] == samples)]
    entries = {
        (str(name), str(decoder)): Entry(
            str(name), str(rows["method"].iloc[0]), str(decoder), rows.set_index("seed")["nda"],
            float((rows["merge_seconds"] + rows["decoder_seconds"]).mean()),
            float((rows["merge_passes"] + rows["decoder_passes"]).mean()),
        )
        for (name, decoder), rows in means.groupby(["name", "decoder"], sort=False)
    }  # fmt: skip

    def best(accept: Callable[[Entry], bool]) -> Entry | None:
        return _strongest(entry for entry in entries.values() if accept(entry))

    closed = best(lambda entry: entry.method not in REFERENCES and not entry.is_trained)
    trained = best(lambda entry: entry.is_trained)
    floor = best(lambda entry: entry.method == "none")
    return Findings(
        _headline(erased, closed, trained, floor),
        closed, trained, floor,
        tuple(_beyond_spread(entries, closed, trained, floor) or _nothing(means))[:_MOST],
        tuple(_cautions(means)),
        entries,
    )  # fmt: skip


def paired(one: Entry, other: Entry) -> tuple[float, float, int]:
    """Return by how much one's NDA is above another's: the mean over seeds, the spread, and the sign where it is clear.

    It is clear where the 95 % confidence interval of a paired t-test excludes zero, over at least `FEWEST_SEEDS`.
    """
    gains = (one.nda - other.nda).dropna()
    mean, spread = float(gains.mean()), float(gains.std(ddof=1))
    if len(gains) < FEWEST_SEEDS:
        return mean, spread, 0
    half = float(stats.t.ppf(0.975, len(gains) - 1)) * spread / math.sqrt(len(gains))
    return mean, spread, 0 if abs(mean) <= max(half, 1e-12) else int(math.copysign(1, mean))


def paired_differences(found: Findings, decoder: str) -> pd.DataFrame:
    """Return differences in NDA between methods in points, ± spread over seeds; those that are clear carry a star.

    Args:
        found: What `findings` returns.
        decoder: Which decoder.

    Returns:
        Text: a line per method, less each of a few: the survivors alone, averaging, COIN, the best trained.
    """
    entries = {name: entry for (name, own), entry in found.entries.items() if own == decoder and name != "oracle"}
    trained = _strongest(entry for entry in entries.values() if entry.is_trained)
    against = [name for name in ("none", "average", "coin", trained and trained.name) if name in entries]
    lines = []
    for name, entry in entries.items():
        line = {"method": name}
        for other in against:
            mean, spread, sign = paired(entry, entries[other])
            line[f"minus {other}"] = "–" if name == other else f"{_points(mean, spread)}{BEST if sign else ''}"
        lines.append(line)
    return pd.DataFrame(lines)


def _headline(erased: str, closed: Entry | None, trained: Entry | None, floor: Entry | None) -> str:
    lost = f"When {erased.replace('1 of', 'one of')} experts is lost, "
    best = closed or trained
    if best is None:
        alone = "nothing was measured" if floor is None else f"the survivors alone keep {floor.text} of its accuracy"
        return f"{lost}{alone}; there is no coded model."
    kind = "the best trained method" if closed is None else "the best closed form"
    text = f"{lost}{best.name}, {kind}, keeps {best.text} of its accuracy with the {best.decoder} decoder"
    relations = [
        (_relation(best, other), f"{other.text} {what}")
        for other, what in (
            (trained if closed else None, f"for {trained.name}, the best trained method" if trained else ""),
            (floor, "without a coded model"),
        )
        if other is not None
    ]
    for place, (relation, said) in enumerate(relations):
        same = place > 0 and relation == relations[place - 1][0]
        text += ", and " if place else ", "
        text += said if same else f"{relation} {said}"
    return f"{text}."


def _relation(one: Entry, other: Entry) -> str:
    if len((one.nda - other.nda).dropna()) < FEWEST_SEEDS:
        return "against"
    return {1: "above", 0: "not clearly apart from", -1: "below"}[paired(one, other)[2]]


def _beyond_spread(
    entries: dict[tuple[str, str], Entry], closed: Entry | None, trained: Entry | None, floor: Entry | None
) -> list[str]:
    """Return differences that are clear of the spread, the most telling first."""

    def compare(one: Entry | None, other: Entry | None, what: str = "") -> list[str]:
        if one is None or other is None or (one.name, one.decoder) == (other.name, other.decoder):
            return []
        mean, spread, sign = paired(one, other)
        side = "above" if sign > 0 else "below"
        text = f"{_called(one)} is {_points(abs(mean), spread, '')} points {side} {_called(other)}{what}."
        return [text] if sign else []

    out = compare(closed, trained, f", at {seconds(closed.seconds)} s against {seconds(trained.seconds)} s"
                  if closed and trained else "")  # fmt: skip
    out += compare(closed or trained, floor, ", with no coded model at all")
    if closed is not None:
        out += compare(closed, entries.get((closed.name, "linear")), ": the decoder alone")
    for decoder in dict.fromkeys(["linear", *([closed.decoder] if closed else [])]):
        out += compare(entries.get(("coin", decoder)), entries.get(("average", decoder)))
    coin = entries.get(("coin", "linear"))
    if coin is not None:
        line = Entry("paper", "", "", coin.nda * 0 + PAPER_NDA, 0.0, 0.0)
        mean, spread, sign = paired(coin, line)
        side = "above" if sign > 0 else "below"
        text = f"{_called(coin)} is {_points(abs(mean), spread, '')} points {side} the {100 * PAPER_NDA:.1f} %"
        out += [f"{text} that the paper reports in some cases."] if sign else []
    return out


def _nothing(means: pd.DataFrame) -> list[str]:
    enough = means["seed"].nunique() >= FEWEST_SEEDS
    return ["No difference between methods is beyond the spread over seeds."] if enough else []


def _cautions(means: pd.DataFrame) -> list[str]:
    out = []
    if (seeds := means["seed"].nunique()) < FEWEST_SEEDS:
        few = "One seed" if seeds == 1 else "Two seeds"
        out.append(f"{few} only: differences are told from chance from three seeds on.")
    oracle = means[(means["method"] == "oracle") & (means["decoder"] == "linear")]
    if bool(((oracle["nda"] - 1).abs() > 1e-3).any()):
        out.append(f"The oracle should have 100 % NDA and has {percent(oracle['nda'].mean())} %: do not trust this.")
    if missing := sorted(set(means.loc[means["nda"].isna(), "name"])):
        out.append(f"NDA is not defined (an expert is never right) for: {', '.join(missing)}.")
    return out


def _strongest(entries: Iterable[Entry]) -> Entry | None:
    measured = [entry for entry in entries if not entry.nda.isna().any()]
    return max(measured, key=lambda entry: float(entry.nda.mean()), default=None)


def _called(entry: Entry) -> str:
    return f"{entry.name} ({entry.decoder})"


def _points(mean: float, spread: float, sign: str = "+") -> str:
    return f"{100 * mean:{sign}.2f}" + ("" if math.isnan(spread) else f" ± {100 * spread:.2f}")
