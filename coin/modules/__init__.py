"""LightningModules: experts, coded models, the distillation baseline, and the passes that measure them."""

from typing import TYPE_CHECKING

from coin.core.lazy import importing

if TYPE_CHECKING:
    from coin.modules.coded import Coded as Coded
    from coin.modules.distillation import (
        DistillationModule as DistillationModule,
        ReadoutDistillationModule as ReadoutDistillationModule,
    )
    from coin.modules.evaluator import DecodingEvaluator as DecodingEvaluator
    from coin.modules.expert import Expert as Expert
    from coin.modules.measure import evaluate as evaluate

# All at once: a command finds a class by its short name among those that are imported.
__getattr__ = importing(__name__, __file__)
