"""Whole experiments: every step from images to results, resumable."""

from coin.experiment.config import BaseConfig, CalibrationConfig, ExpertConfig, TrainingConfig, WandbConfig
from coin.experiment.experiment import Experiment
from coin.experiment.experts import Experts
from coin.experiment.merge import Ingredients, merge_experts

__all__ = [
    "BaseConfig",
    "CalibrationConfig",
    "Experiment",
    "ExpertConfig",
    "Experts",
    "Ingredients",
    "TrainingConfig",
    "WandbConfig",
    "merge_experts",
]
