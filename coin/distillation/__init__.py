"""Merge methods that train a coded model: distillation of the experts, their search and their training."""

from coin.distillation.method import Distillation as Distillation, distill as distill
