"""Callbacks for training: what is written of an expert when its training ends."""

from coin.callbacks.export import ExpertExport
from coin.callbacks.fisher import FisherEstimator
from coin.callbacks.weights import Weights

__all__ = ["ExpertExport", "FisherEstimator", "Weights"]
