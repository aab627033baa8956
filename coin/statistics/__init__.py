"""Passes over calibration data that return named tensors: Fisher diagonals and Gram matrices."""

from coin.statistics.cotangents import FisherKind as FisherKind
from coin.statistics.files import load_statistic as load_statistic, save_statistic as save_statistic
from coin.statistics.fisher import (
    DEFAULT_MEMORY_MIB as DEFAULT_MEMORY_MIB,
    FisherOptions as FisherOptions,
    fisher_diagonal as fisher_diagonal,
    fisher_sums as fisher_sums,
)
from coin.statistics.gram import gram_sums as gram_sums
from coin.statistics.sums import Sums as Sums, reduce_sums as reduce_sums, shard as shard
