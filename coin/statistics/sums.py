"""Sums over samples: what a pass over data leaves, added over batches and over processes before any division."""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from coin.core.processes import process_count
from coin.errors import ConfigurationError, StateError


@dataclass(frozen=True)
class Sums:
    """Sums of a statistic over samples, and what they cost.

    Attributes:
        values: Name → sum over samples of the per-sample statistic.
        count: Number of samples in the sums.
        passes: Forward-equivalents spent: 1 per sample for a forward pass, 2 per sample and cotangent for a backward.
    """

    values: Mapping[str, Tensor]
    count: int
    passes: float

    def mean(self) -> dict[str, Tensor]:
        """Return the mean over samples of every tensor; raises StateError where there are none."""
        if self.count < 1:
            raise StateError(
                "found 0 calibration samples, expected at least 1; raise the number of samples"
            )
        return {name: value / self.count for name, value in self.values.items()}


def sum_type(tensor: Tensor) -> torch.dtype:
    """Return the type that sums of a tensor are kept in: its own, but float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def reduce_sums(sums: Sums) -> Sums:
    """Return the sums over all processes of the default process group, the same on each; `sums` itself without one.

    They are added in float64. A process may lack tensors: experts of a mixture that no sample came to.
    """
    if process_count() == 1:
        return sums
    # The current one.
    device = torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
    empty = {name: tensor.to("meta") for name, tensor in sums.values.items()}
    layouts: list[dict[str, Tensor]] = [{}] * process_count()
    distributed.all_gather_object(layouts, empty)
    values = {}
    for name, like in ChainMap(*layouts).items():
        own = sums.values.get(name, torch.zeros_like(like, device=device))
        total = own.detach().to(device, torch.float64, copy=True).contiguous()
        distributed.all_reduce(total)
        values[name] = total.to(own)
    costs = torch.tensor([sums.count, sums.passes], dtype=torch.float64, device=device)
    distributed.all_reduce(costs)
    count, passes = costs.tolist()
    return Sums(values, round(count), passes)


def shard(n: int, rank: int, world: int) -> range:
    """Return the indices of the samples that process `rank` of `world` takes: every sample once, one each at least."""
    if n < world:
        raise ConfigurationError(
            f"found {n} calibration samples for {world} processes, expected at least one each; "
            "raise the number of samples or take fewer devices"
        )
    return range(rank, n, world)
