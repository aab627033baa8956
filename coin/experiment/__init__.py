"""Whole experiments: every step from images to results, resumable."""

from coin.experiment.experiment import Experiment

__all__ = ["Experiment"]
