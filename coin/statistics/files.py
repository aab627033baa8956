"""Statistics as safetensors files that say which weights, which data and how many samples they are of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coin.errors import FileError
from coin.state import State, check_finite, save_state
from coin.state_file import StateFile
from coin.statistics.sums import Sums


@dataclass(frozen=True)
class StatisticFile:
    """A statistic read from a file.

    Attributes:
        values: Name → mean over samples, read when they are asked for.
        samples: The number of samples in the mean.
        seconds: What it took to compute, wall time.
        passes: What it took, in forward-equivalents.
        provenance: Everything that was written with it.
    """

    values: State
    samples: int
    seconds: float
    passes: float
    provenance: dict[str, Any]


def save_statistic(path: Path, sums: Sums, *, statistic: str, weights: str, seconds: float, **provenance: Any) -> None:
    """Write the mean of a statistic.

    Args:
        path: The file.
        sums: The sums over all processes.
        statistic: What it is: ``fisher`` or ``gram``.
        weights: The `coin.state.fingerprint` of the network's state dict.
        seconds: What the pass took, wall time.
        provenance: Further JSON values: the kind, the task, the data, the seed.

    Raises:
        StateError: There are no samples or a value is not finite.
        FileError: The file cannot be written.
    """
    found = {"statistic": statistic, "weights": weights}
    spent = {"samples": sums.count, "seconds": seconds, "passes": sums.passes}
    save_state(path, sums.mean(), provenance | found | spent)


def load_statistic(path: Path, *, statistic: str, weights: str | None = None) -> StatisticFile:
    """Open a statistic that `save_statistic` wrote.

    Args:
        path: The file.
        statistic: What it must be: ``fisher`` or ``gram``.
        weights: The fingerprint of the network it must belong to; none accepts any.

    Raises:
        FileError: The file is missing, damaged, of another statistic, or of other weights than the expert's,
            or a Fisher has a negative number.
        StateError: A number is not finite.
    """
    values = StateFile(path)
    provenance = values.provenance
    found = provenance.get("statistic")
    if found != statistic:
        raise FileError(
            f"'{path}' holds {found or 'no statistic'}, expected {statistic}; give the file that coin fisher wrote"
        )
    if weights is not None and provenance.get("weights") != weights:
        raise FileError(
            f"'{path}' is of weights {str(provenance.get('weights'))[:12]}…, expected {weights[:12]}…: the expert has "
            "changed since; run coin fisher again"
        )
    check_finite(values, f"the {statistic} in '{path}'")
    if statistic == "fisher" and (negative := [name for name, value in values.items() if bool((value < 0).any())]):
        raise FileError(f"'{path}' holds a negative number in '{negative[0]}', expected squares; run coin fisher again")
    try:
        spent = int(provenance["samples"]), float(provenance["seconds"]), float(provenance["passes"])
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(
            f"'{path}' does not say its samples, seconds, passes as numbers; run coin fisher again"
        ) from error
    return StatisticFile(values, *spent, provenance)
