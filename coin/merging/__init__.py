"""Merge methods: experts and statistics of their calibration data in, coded models out."""

from coin.merging.average import Average, HeadFit
from coin.merging.closed_form import MergeMethod
from coin.merging.coin import Coin
from coin.merging.experts import Experts
from coin.merging.foreign import Foreign, UserMethod
from coin.merging.full_fisher import FullFisher
from coin.merging.gauss_newton import GaussNewton
from coin.merging.method import CodedModel, Merged, Method, merge_networks
from coin.merging.refit import Refit
from coin.merging.regmean import RegMean, RegMeanLayers
from coin.merging.target import Target
from coin.merging.task_vectors import Base, TaskArithmetic, Ties, Wudi

__all__ = [
    "Average",
    "Base",
    "CodedModel",
    "Coin",
    "Experts",
    "Foreign",
    "FullFisher",
    "GaussNewton",
    "HeadFit",
    "MergeMethod",
    "Merged",
    "Method",
    "Refit",
    "RegMean",
    "RegMeanLayers",
    "Target",
    "TaskArithmetic",
    "Ties",
    "UserMethod",
    "Wudi",
    "merge_networks",
]
