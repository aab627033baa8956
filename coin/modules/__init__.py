"""LightningModules: experts, coded models, the distillation baseline, and the passes that measure them."""

from coin.modules.coded import Coded as Coded
from coin.modules.distillation import DistillationModule as DistillationModule
from coin.modules.evaluator import DecodingEvaluator as DecodingEvaluator
from coin.modules.expert import Expert as Expert
from coin.modules.measure import evaluate as evaluate
from coin.modules.stand_in import stand_in as stand_in
