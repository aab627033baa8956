"""Merge methods that train a coded model: distillation of the experts, and its training in memory."""

from coin.distillation.method import Distillation as Distillation
