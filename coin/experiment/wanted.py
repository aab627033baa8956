"""Which statistics of the experts a merge method wants, and where their files are."""

from dataclasses import dataclass
from pathlib import Path

from coin.experiment.config import CalibrationConfig
from coin.merging import MergeMethod, Requirement
from coin.modules import Distillation, StatisticKind
from coin.statistics import FisherKind


@dataclass(frozen=True)
class Wanted:
    """One statistic of every expert.

    Args:
        statistic: ``fisher`` or ``gram``.
        data: On which samples: each expert's ``own``, or ``pooled``.
        kind: Which Fisher diagonal; none for Gram matrices.
    """

    statistic: StatisticKind
    data: str
    kind: FisherKind | None = None

    def __str__(self) -> str:
        name = "Gram matrices" if self.kind is None else "Fisher"
        return f"{name} ({', '.join(self.options.values())})"

    def path(self, folder: Path, task: str, calibration: CalibrationConfig) -> Path:
        """Return the file of an expert's statistic; the experiment's own kind and data have the plain name."""
        own = (calibration.fisher_data, None if self.kind is None else calibration.fisher_kind)
        suffix = "" if own == (self.data, self.kind) else "".join(f"-{part}" for part in self.options.values())
        return folder / "statistics" / f"{task}.{self.statistic}{suffix}.safetensors"

    @property
    def options(self) -> dict[str, str]:
        """What tells it from others of its statistic."""
        return ({} if self.kind is None else {"kind": str(self.kind)}) | {"data": self.data}


def wanted_by(method: MergeMethod | Distillation, calibration: CalibrationConfig) -> list[Wanted]:
    """Return the statistics that a method asks for, the experiment's choice where it has none of its own."""
    requires: frozenset[Requirement] = getattr(method, "requires", frozenset())
    found = []
    if Requirement.FISHER in requires:
        kind = FisherKind(getattr(method, "fisher_kind", None) or calibration.fisher_kind)
        data = getattr(method, "fisher_data", None) or calibration.fisher_data
        found.append(Wanted(StatisticKind.fisher, data, kind))
    if Requirement.GRAM in requires:
        found.append(Wanted(StatisticKind.gram, getattr(method, "gram_data", None) or calibration.fisher_data))
    return found
