"""Callbacks that write a trained network and its Fisher when training ends."""

from coin.callbacks.export import ExpertExport as ExpertExport, Weights as Weights
from coin.callbacks.fisher import (
    FisherEstimator as FisherEstimator,
    estimate_statistic as estimate_statistic,
)
