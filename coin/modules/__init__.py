"""LightningModules: experts, coded models, the distillation baseline, and the passes that measure them."""

from typing import TYPE_CHECKING

from coin.core.lazy import importing

if TYPE_CHECKING:
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

# All at once: a command finds a class by its short name among those that are imported.
__getattr__ = importing(__name__, ["coded", "distillation", "evaluator", "expert", "measure", "readout_distillation"])
