"""Merge methods that train a coded model: distillation of the experts, their search and their training."""

from coin.distillation.method import Distillation
from coin.distillation.readout import ReadoutDistillation, distill

__all__ = ["Distillation", "ReadoutDistillation", "distill"]
