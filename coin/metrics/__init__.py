"""Torchmetrics classes over pure functions: decoding accuracy and residual."""

from coin.metrics.decoding import DecodingAccuracy, Residual
from coin.metrics.functional import normalized_decoding_accuracy

__all__ = ["DecodingAccuracy", "Residual", "normalized_decoding_accuracy"]
