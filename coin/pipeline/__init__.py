"""Whole experiments: every step from images to results, resumable."""

from typing import TYPE_CHECKING

from coin.core.lazy import importing

if TYPE_CHECKING:
    from coin.pipeline.experiment import Experiment as Experiment

__getattr__ = importing(__name__, __file__)
