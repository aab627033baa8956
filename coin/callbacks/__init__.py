"""Callbacks for training: what is written of an expert when its training ends, or is interrupted."""

from coin.callbacks.export import ExpertExport
from coin.callbacks.fisher import FisherEstimator
from coin.callbacks.requeue import Requeue
from coin.callbacks.weights import Weights

__all__ = ["ExpertExport", "FisherEstimator", "Requeue", "Weights"]
