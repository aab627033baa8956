"""The statistics that a merge needs, and the options for computing them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from coin.core.choices import check_integer, parse_enum
from coin.errors import ConfigurationError
from coin.files.tensors import State
from coin.statistics.cotangents import FisherKind, check_mc_samples
from coin.statistics.fisher import Precision, fisher_sums
from coin.statistics.gram import gram_sums
from coin.statistics.memory import DEFAULT_MEMORY_MIB
from coin.statistics.sums import Sums


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

    @property
    def alternatives(self) -> "list[DataChoice]":
        """The concrete data that it includes."""
        return [DataChoice.own, DataChoice.pooled] if self is DataChoice.auto else [self]


@dataclass(frozen=True)
class Statistic:
    """One statistic of every expert: on ``own`` or ``pooled`` samples, a Fisher diagonal of a kind or Gram matrices."""

    name: StatisticKind
    data: DataChoice
    kind: FisherKind | None = None

    def __str__(self) -> str:
        """Name it for a person."""
        return f"{'Gram matrices' if self.kind is None else 'Fisher'} ({', '.join(self.options.values())})"

    @property
    def options(self) -> dict[str, str]:
        """Its distinguishing options."""
        return ({} if self.kind is None else {"kind": str(self.kind)}) | {"data": str(self.data)}


@dataclass(frozen=True)
class StatisticOptions:
    """How a statistic is computed, of a file, after a training or in an experiment.

    Args:
        statistic: ``fisher`` or ``gram``.
        kind: Which Fisher diagonal; none takes ``exact``. Gram matrices have no kinds.
        mc_samples: k, the number of random cotangents a sample, for the Monte Carlo kind.
        memory_mib: Bound on a Fisher pass's working memory in MiB, beside the network and the accumulators.
        precision: The type that a Fisher pass runs the network in.

    Raises:
        ConfigurationError: An option is out of its range, or belongs to another statistic or kind.
    """

    statistic: StatisticKind = StatisticKind.fisher
    kind: FisherKind | None = None
    mc_samples: int | None = None
    memory_mib: int = DEFAULT_MEMORY_MIB
    precision: Precision = Precision.full

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistic", parse_enum(StatisticKind, "statistic", self.statistic))
        object.__setattr__(self, "precision", parse_enum(Precision, "precision", self.precision))
        check_integer("memory_mib", self.memory_mib, 1)
        if self.statistic is StatisticKind.fisher:
            kind = FisherKind.exact if self.kind is None else parse_enum(FisherKind, "kind", self.kind)
            object.__setattr__(self, "kind", kind)
            check_mc_samples(kind, self.mc_samples)
        elif not (self.kind is None and self.mc_samples is None and self.precision is Precision.full):
            raise ConfigurationError(
                f"found kind={self.kind}, mc_samples={self.mc_samples} and precision={self.precision} for Gram "
                "matrices, expected none of them: they are a Fisher's; leave them out or set statistic=fisher"
            )

    @property
    def needs_labels(self) -> bool:
        """Whether the true classes of the samples go into it."""
        return self.kind is FisherKind.empirical

    @property
    def provenance(self) -> dict[str, Any]:
        """The entries in a file's metadata."""
        own = {} if self.kind is None else {"kind": str(self.kind), "cotangents": self.mc_samples}
        rounded = {} if self.precision is Precision.full else {"precision": str(self.precision)}
        return {"statistic": str(self.statistic), **own, **rounded}


def statistic_sums(
    network: nn.Module,
    batches: Iterable[Any],
    options: StatisticOptions,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    rank: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Sums:
    """Return the sums of a network's statistic over this process's samples, on the network's device.

    `labels` are these samples' true classes, if the options need them; Monte Carlo's random cotangents depend on the
    seed and on this process's rank. `progress` is called with the number of samples that are done.
    """
    if options.kind is None:
        return gram_sums(network, batches, progress=progress)
    generator = None
    if options.kind is FisherKind.monte_carlo:
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
        generator = torch.Generator(device).manual_seed(seed * 100_003 + rank)
    return fisher_sums(
        network,
        batches,
        kind=options.kind,
        labels=labels,
        mc_samples=options.mc_samples,
        generator=generator,
        memory_mib=options.memory_mib,
        precision=options.precision,
        progress=progress,
    )


Given = Sequence[State] | Mapping[str, Sequence[State]]
"""Every expert's statistic; or several of them, by the data that they are of: ``own``, ``pooled``."""
