"""Torchmetrics classes over pure functions: decoding accuracy and residual."""

from coin.metrics.decoding import DecodingAccuracy, Residual
from coin.metrics.functional import decoding_counts, normalized_decoding_accuracy, squared_residual

__all__ = [
    "DecodingAccuracy",
    "Residual",
    "decoding_counts",
    "normalized_decoding_accuracy",
    "squared_residual",
]
