"""Passes over calibration data that return named tensors: Fisher diagonals, Gram matrices, matrix-free products."""

from coin.statistics.cotangents import FisherKind
from coin.statistics.files import load_statistic, save_statistic
from coin.statistics.fisher import Precision, fisher_diagonal, fisher_sums
from coin.statistics.gram import gram_sums
from coin.statistics.memory import DEFAULT_MEMORY_MIB
from coin.statistics.products import OutputMap
from coin.statistics.sums import TRANSPOSED, Sums, check_shares, reduce_sums, shard

__all__ = [
    "DEFAULT_MEMORY_MIB",
    "TRANSPOSED",
    "FisherKind",
    "OutputMap",
    "Precision",
    "Sums",
    "check_shares",
    "fisher_diagonal",
    "fisher_sums",
    "gram_sums",
    "load_statistic",
    "reduce_sums",
    "save_statistic",
    "shard",
]
