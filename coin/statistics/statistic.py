"""Which statistics of experts a merge needs, and the pass that computes one."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from coin.statistics.cotangents import FisherKind
from coin.statistics.fisher import FisherOptions, fisher_sums
from coin.statistics.gram import gram_sums
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
    """Each expert's on all tasks' samples: then it is E_x‖f_θ − Σ_i β_i f_i‖², up to a constant."""


@dataclass(frozen=True)
class Statistic:
    """One statistic of every expert: on ``own`` or ``pooled`` samples, a Fisher diagonal of a kind or Gram matrices."""

    name: StatisticKind
    data: DataChoice
    kind: FisherKind | None = None

    def __str__(self) -> str:
        if self.kind is None:
            return f"Gram matrices ({self.data})"
        return f"Fisher ({self.kind}, {self.data})"


def statistic_sums(
    network: nn.Module,
    batches: Iterable[Any],
    options: FisherOptions | None,
    *,
    seed: int = 0,
    rank: int = 0,
) -> Sums:
    """Return the sums of a network's Fisher, or without options of its Gram matrices, over this process's samples.

    Monte Carlo's random cotangents depend on the seed and on this process's rank; the rest is as of `fisher_sums`.
    """
    if options is None:
        return gram_sums(network, batches)
    # Of the CPU, so that every device has its numbers.
    generator = torch.Generator().manual_seed(seed * 100_003 + rank)
    return fisher_sums(network, batches, options, generator=generator)
