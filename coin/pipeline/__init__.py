"""Whole experiments: every step from images to results, resumable."""

from coin.pipeline.experiment import Experiment as Experiment
