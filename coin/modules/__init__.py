"""LightningModules: experts, coded models, the distillation baseline, and the passes that measure them."""

from coin.modules.coded import Coded
from coin.modules.distillation import Distillation, ReadoutDistillation
from coin.modules.evaluator import DecodingEvaluator
from coin.modules.examples import KeptSamples
from coin.modules.expert import Expert, OptimizerKind, Schedule
from coin.modules.statistic_pass import StatisticPass
from coin.modules.variants import NONE, ORACLE, Outcome, Variant

__all__ = [
    "NONE",
    "ORACLE",
    "Coded",
    "DecodingEvaluator",
    "Distillation",
    "Expert",
    "KeptSamples",
    "OptimizerKind",
    "Outcome",
    "ReadoutDistillation",
    "Schedule",
    "StatisticPass",
    "Variant",
]
