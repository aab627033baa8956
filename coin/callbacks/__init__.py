"""Callbacks: export of an expert and its Fisher when training ends, and a progress bar."""

from coin.callbacks.export import ExpertExport, Weights
from coin.callbacks.fisher import FisherEstimator
from coin.callbacks.progress import RunProgress

__all__ = ["ExpertExport", "FisherEstimator", "RunProgress", "Weights"]
