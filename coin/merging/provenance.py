"""What made a coded model, as its file says."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from coin.errors import FileError
from coin.networks.files import NetworkFile


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What made a coded model: the metadata that ``coin merge`` writes to its file beside the network's own.

    Args:
        label: The method's label, of a compressed variant with the compression's name: what results call it.
        method: The method's own name, and its options.
        batchnorm: The requested BatchNorm policy; empty without BatchNorm.
        code: The code's matrix, R×N.
        row: Which of the code's rows it is.
        tasks: The experts' tasks.
        class_counts: The experts' numbers of classes.
        experts: The fingerprints of the experts' states.
        samples_per_task: P; None if unknown.
        chosen: What the method chose, plain values.
        seconds, passes: What making it took, with the statistics: wall time, and forward-equivalents.
        sha256: The hashes of the files that were read.
        made_by: The command.
    """

    label: str
    method: Mapping[str, Any] = field(default_factory=dict)
    batchnorm: str
    code: list[list[float]]
    row: int
    tasks: Sequence[str] = ()
    class_counts: Sequence[int] = ()
    experts: list[str]
    samples_per_task: int | None
    chosen: Mapping[str, Any] = field(default_factory=dict)
    seconds: float
    passes: float
    sha256: Mapping[str, str] = field(default_factory=dict)
    made_by: str = "coin merge"

    @classmethod
    def of(cls, file: NetworkFile) -> Self:
        """Return what a network's file says; a FileError where it is no coded model's."""
        names = [each.name for each in fields(cls)]
        own = {name: file.provenance[name] for name in names if name in file.provenance}
        try:
            return cls(**own)
        except TypeError as error:
            raise FileError(
                f"'{file.path}' is no coded model, expected a file that coin merge wrote"
            ) from error

    def as_dict(self) -> dict[str, Any]:
        """Return the entries of a file's metadata."""
        return asdict(self)
