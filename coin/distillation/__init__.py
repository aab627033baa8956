"""Merge methods that train a coded model: distillation of the experts, its search and its training in memory."""

from coin.distillation.method import Distillation as Distillation
