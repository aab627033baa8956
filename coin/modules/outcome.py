"""What an evaluation measures."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coin.modules.variants import Variant


@dataclass(frozen=True)
class Outcome:
    """What was measured for one lost expert, under one erasure, with one variant and one decoder.

    Attributes:
        variant: The variant.
        decoder: The decoder.
        erased: The lost tasks.
        task: The task whose expert was decoded, on whose test set.
        expert_accuracy: Accuracy of the expert itself.
        decoded_accuracy: Accuracy of the decoded output.
        nda: Their ratio.
        agreement: Share of test inputs where both answer the same class.
        residual: ‖f_c − Σβ_if_i‖ / ‖Σβ_if_i‖ on the test set; NaN without coded models.
        calibration_seconds: What making the coded models and fitting the decoder took, wall time.
        sample_passes: The same in forward-equivalents.
        confusion: Counts ``[C_j, C_j]``: the expert's answer by the decoded one.
    """

    variant: Variant
    decoder: str
    erased: tuple[str, ...]
    task: str
    expert_accuracy: float
    decoded_accuracy: float
    nda: float
    agreement: float
    residual: float
    calibration_seconds: float
    sample_passes: float
    confusion: NDArray[np.int64]
