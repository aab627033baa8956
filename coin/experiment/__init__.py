"""Whole experiments: every step from images to results, resumable."""

from coin.experiment.config import BaseConfig, CalibrationConfig, ExpertConfig, WandbConfig
from coin.experiment.experiment import Experiment

__all__ = [
    "BaseConfig",
    "CalibrationConfig",
    "Experiment",
    "ExpertConfig",
    "WandbConfig",
]
