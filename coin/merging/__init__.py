"""Merge methods: experts and statistics in, the parameters of a coded model out."""

from coin.merging.average import Average
from coin.merging.coin import Coin
from coin.merging.feature_map import FeatureMap
from coin.merging.full_fisher import FullFisher
from coin.merging.gauss_newton import GaussNewton
from coin.merging.head_fit import HeadFit
from coin.merging.inputs import MergeInputs, Requirement
from coin.merging.method import MergeMethod
from coin.merging.regmean import RegMean, RegMeanLayers
from coin.merging.task_vectors import TaskArithmetic, Ties

__all__ = [
    "Average",
    "Coin",
    "FeatureMap",
    "FullFisher",
    "GaussNewton",
    "HeadFit",
    "MergeInputs",
    "MergeMethod",
    "RegMean",
    "RegMeanLayers",
    "Requirement",
    "TaskArithmetic",
    "Ties",
]
