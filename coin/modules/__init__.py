"""LightningModules: experts, coded models, the distillation baseline, and the passes that measure them."""

from coin.evaluation.variants import Outcome
from coin.modules.coded import Coded
from coin.modules.distillation import DistillationModule
from coin.modules.evaluator import DecodingEvaluator
from coin.modules.expert import Expert
from coin.modules.measure import evaluate
from coin.modules.readout_distillation import ReadoutDistillationModule
from coin.networks.recipe import OptimizerKind, Recipe, Schedule

__all__ = [
    "Coded",
    "DecodingEvaluator",
    "DistillationModule",
    "Expert",
    "OptimizerKind",
    "Outcome",
    "ReadoutDistillationModule",
    "Recipe",
    "Schedule",
    "evaluate",
]
