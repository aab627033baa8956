"""Figures of decoding accuracy. Each takes rows of a summary and returns a figure with labelled axes."""

from coin.reporting.curves import nda_against_option, nda_against_samples
from coin.reporting.dots import nda_by_experiment, nda_by_method, nda_per_task
from coin.reporting.scatter import nda_against_accuracy, nda_against_cost, nda_against_residual

__all__ = [
    "nda_against_accuracy",
    "nda_against_cost",
    "nda_against_option",
    "nda_against_residual",
    "nda_against_samples",
    "nda_by_experiment",
    "nda_by_method",
    "nda_per_task",
]
