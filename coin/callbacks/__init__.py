"""Callbacks: what is written of an expert when its training ends or is interrupted, and how far a Trainer has come."""

from coin.callbacks.export import ExpertExport, Weights
from coin.callbacks.fisher import FisherEstimator
from coin.callbacks.progress import RunProgress

__all__ = ["ExpertExport", "FisherEstimator", "RunProgress", "Weights"]
