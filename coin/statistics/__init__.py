"""Passes over calibration data that return named tensors: Fisher diagonals, Gram matrices, matrix-free products."""

from coin.statistics.fisher import DEFAULT_MEMORY_MIB, fisher_diagonal, fisher_sums
from coin.statistics.kinds import CotangentDistribution, FisherKind
from coin.statistics.sums import Sums, reduce_sums, shard

__all__ = [
    "DEFAULT_MEMORY_MIB",
    "CotangentDistribution",
    "FisherKind",
    "Sums",
    "fisher_diagonal",
    "fisher_sums",
    "reduce_sums",
    "shard",
]
