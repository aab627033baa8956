"""Statistics as safetensors files that say which weights, which data and how many samples they are of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coin.errors import FileError
from coin.state import State, save_state
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
    written = {
        **provenance,
        "statistic": statistic,
        "weights": weights,
        "samples": sums.count,
        "seconds": seconds,
        "passes": sums.passes,
    }
    save_state(path, sums.mean(), written)


def load_statistic(path: Path, *, statistic: str, weights: str | None = None) -> StatisticFile:
    """Open a statistic that `save_statistic` wrote.

    Args:
        path: The file.
        statistic: What it must be: ``fisher`` or ``gram``.
        weights: The fingerprint of the network it must belong to; none accepts any.

    Raises:
        FileError: The file is missing, damaged, of another statistic, or of other weights than the expert's.
    """
    values = StateFile(path)
    provenance = values.provenance
    found = provenance.get("statistic")
    if found != statistic:
        raise FileError(
            f"'{path}' holds {found or 'no statistic'}, expected {statistic}; give the file that coin fisher wrote"
        )
    if weights is not None and provenance["weights"] != weights:
        raise FileError(
            f"'{path}' is of weights {provenance['weights'][:12]}…, expected {weights[:12]}…: the expert has changed "
            "since; run coin fisher again"
        )
    return StatisticFile(
        values, int(provenance["samples"]), float(provenance["seconds"]), float(provenance["passes"]), provenance
    )
