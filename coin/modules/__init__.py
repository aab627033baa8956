"""LightningModules: experts, coded models, the distillation baseline, and the passes that measure them."""

from coin.modules.coded import Coded
from coin.modules.distillation import DistillationModule
from coin.modules.evaluator import DecodingEvaluator
from coin.modules.expert import Expert
from coin.modules.measure import evaluate
from coin.modules.readout_distillation import ReadoutDistillationModule

__all__ = [
    "Coded",
    "DecodingEvaluator",
    "DistillationModule",
    "Expert",
    "ReadoutDistillationModule",
    "evaluate",
]
