"""Sums over samples: what a pass over data leaves, added over batches and over processes before any division."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed

from coin.core.processes import process_count
from coin.errors import ConfigurationError, StateError
from coin.files.tensors import check_layout

TRANSPOSED = ":T"
"""Ends the name of a Gram matrix of a weight [in, out] that multiplies from the right, x @ W."""


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
            raise StateError("found 0 calibration samples, expected at least 1; raise the number of samples")
        return {name: value / self.count for name, value in self.values.items()}

    def __add__(self, other: "Sums") -> "Sums":
        """Return the sums over both sets of samples; what only one has is zero in the other. StateError by shapes."""
        shared = [name for name in self.values if name in other.values]
        parts = [{name: each.values[name] for name in shared} for each in (self, other)]
        check_layout(parts[0], parts[1], "the second sums")
        values = {**self.values, **other.values, **{name: parts[0][name] + parts[1][name] for name in shared}}
        return Sums(values, self.count + other.count, self.passes + other.passes)


def sum_type(tensor: Tensor) -> torch.dtype:
    """Return the type that sums of a tensor are kept in: its own, but float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def reduce_sums(sums: Sums) -> Sums:
    """Return the sums over all processes of the default process group, the same on each; `sums` itself without one.

    All travel as one float64 vector. A process may lack tensors: experts of a mixture that no sample came to.
    """
    if process_count() == 1:
        return sums
    where = torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")  # the current one
    layouts: list[Sums] = [sums] * distributed.get_world_size()
    empty = {name: tensor.to("meta") for name, tensor in sums.values.items()}
    distributed.all_gather_object(layouts, replace(sums, values=empty))
    whole = sum(layouts[1:], layouts[0])
    own = [sums.values.get(name, torch.zeros_like(like, device=where)) for name, like in whole.values.items()]
    numbers = torch.tensor([sums.count, sums.passes], dtype=torch.float64, device=where)
    flat = torch.cat([*(tensor.detach().to(where, torch.float64).flatten() for tensor in own), numbers])
    distributed.all_reduce(flat)
    *pieces, numbers = torch.split(flat, [*(tensor.numel() for tensor in own), 2])
    totals = [piece.view(tensor.shape).to(tensor) for piece, tensor in zip(pieces, own, strict=True)]
    return Sums(dict(zip(whole.values, totals, strict=True)), round(float(numbers[0])), float(numbers[1]))


def shard(n: int, rank: int, world: int) -> range:
    """Return the indices of the samples that process `rank` of `world` takes: every sample once, one each at least."""
    if n < world:
        found = f"found {n} calibration samples for {world} processes, expected at least one each"
        raise ConfigurationError(f"{found}; raise the number of samples or take fewer devices")
    return range(rank, n, world)
