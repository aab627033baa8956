"""Merge methods: experts and statistics in, the parameters of a coded model out."""

from coin.merging.average import Average
from coin.merging.coin import Coin
from coin.merging.inputs import MergeInputs, Requirement
from coin.merging.method import MergeMethod

__all__ = ["Average", "Coin", "MergeInputs", "MergeMethod", "Requirement"]
