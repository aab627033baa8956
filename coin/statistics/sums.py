"""Sums over samples: what a pass over data leaves, added over batches and over processes before any division."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from coin.errors import ConfigurationError, StateError
from coin.state import check_same_layout


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
        """Return the mean over samples of every tensor.

        Raises:
            StateError: There are no samples.
        """
        if self.count < 1:
            raise StateError("found 0 calibration samples, expected at least 1; raise the number of samples")
        return {name: value / self.count for name, value in self.values.items()}

    def __add__(self, other: "Sums") -> "Sums":
        """Return the sums over both sets of samples.

        Raises:
            StateError: The names or shapes differ.
        """
        check_same_layout([self.values, other.values], ["the first sums", "the second sums"])
        values = {name: value + other.values[name] for name, value in self.values.items()}
        return Sums(values, self.count + other.count, self.passes + other.passes)


def sum_type(tensor: Tensor) -> torch.dtype:
    """Return the type that sums of a tensor are kept in: its own, but float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def reduce_sums(sums: Sums) -> Sums:
    """Return the sums over all processes of the default process group, the same on each; `sums` itself without one.

    All accumulators travel as one float64 vector with the count behind them, in a single SUM reduction, on the
    device that the group's backend needs. Every process must hold the same tensors.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return sums
    tensors = list(sums.values.values())
    where = tensors[0].device if tensors else torch.device("cpu")
    if distributed.get_backend() == "nccl" and where.type != "cuda":
        where = torch.device("cuda", torch.cuda.current_device())
    elif distributed.get_backend() == "gloo":
        where = torch.device("cpu")
    tail = torch.tensor([sums.count, sums.passes], dtype=torch.float64, device=where)
    flat = torch.cat([*(tensor.detach().to(where, torch.float64).flatten() for tensor in tensors), tail])
    distributed.all_reduce(flat)
    pieces = torch.split(flat, [*(tensor.numel() for tensor in tensors), 2])
    values = {
        name: piece.view(tensor.shape).to(tensor)
        for (name, tensor), piece in zip(sums.values.items(), pieces[:-1], strict=True)
    }
    return Sums(values, round(float(pieces[-1][0])), float(pieces[-1][1]))


def check_shares(samples: int, world: int) -> None:
    """Check that every process gets a sample, as it must to have sums.

    Raises:
        ConfigurationError: There are fewer samples than processes.
    """
    if samples < world:
        raise ConfigurationError(
            f"found {samples} calibration samples for {world} processes, expected at least one each; raise the number "
            "of samples or take fewer devices"
        )


def shard(n: int, rank: int, world: int) -> range:
    """Return the indices of the samples that process `rank` of `world` takes: every sample once, none twice.

    Raises:
        ConfigurationError: The rank is not in [0, world).
    """
    if not 0 <= rank < world:
        raise ConfigurationError(f"found rank {rank} of {world} processes, expected 0 ≤ rank < {world}")
    return range(rank, n, world)
