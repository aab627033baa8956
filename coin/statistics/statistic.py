"""Which statistic of the experts a merge asks for."""

from dataclasses import dataclass
from enum import StrEnum

from coin.statistics.cotangents import FisherKind


class StatisticKind(StrEnum):
    """What a pass computes: the ``fisher`` diagonal, or the ``gram`` matrices of all layers' inputs."""

    fisher = "fisher"
    gram = "gram"


class DataChoice(StrEnum):
    """On which samples the statistics of the experts are taken."""

    own = "own"
    """Each expert's on its own task's samples: the merge then minimises Σ_i β_i E_{x∈T_i}‖f_θ − f_i‖²."""

    pooled = "pooled"
    """Each expert's on all tasks' samples: then it is Σ_i β_i E_x‖f_θ − f_i‖², which up to a constant is the coding
    objective E_x‖f_θ − Σ_i β_i f_i‖²."""

    auto = "auto"
    """Both, and the merge with the smaller error of decoded answers on held-out calibration samples."""


@dataclass(frozen=True)
class Statistic:
    """One statistic of every expert.

    Args:
        name: ``fisher`` or ``gram``.
        data: On which samples, ``own`` or ``pooled``.
        kind: Which Fisher diagonal; none for Gram matrices.
    """

    name: StatisticKind
    data: DataChoice
    kind: FisherKind | None = None

    def __str__(self) -> str:
        """Name it for a person."""
        return f"{'Gram matrices' if self.kind is None else 'Fisher'} ({', '.join(self.options.values())})"

    @property
    def options(self) -> dict[str, str]:
        """What tells it from others of its name."""
        return ({} if self.kind is None else {"kind": str(self.kind)}) | {"data": str(self.data)}
