"""The calibrated decoders, of logits alone or with features: ridge regressions fitted on calibration answers."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from coin.coding.answers import Answers
from coin.coding.decoder import Decoder
from coin.coding.decoder_config import DecoderKind
from coin.coding.ridge import fit_blocks
from coin.core.devices import double
from coin.errors import DecodingError


class RidgeDecoder(Decoder):
    """The calibrated decoders: ridge regression from what arrives to the lost experts' logits, in float64.

    Inputs are the logits of the coded models and of the surviving experts side by side, targets the lost experts' own
    logits on the same calibration inputs; both are centred, and each lost expert gets the ridge with the smallest
    leave-one-out error (`fit_ridge`). It works with any number of coded models, none included, and has no erasure
    budget: something must arrive, that is all.

    As ``feature_ridge`` it reads the features of every arriving network too. All logits together, and the features of
    each network, are blocks that are divided by their scale (`fit_blocks`): they differ in unit and size.

    The buffers are those of `RidgeFit`, with targets ``[|erased|·C]``.
    """

    coefficients: Tensor
    input_mean: Tensor
    target_mean: Tensor

    def __init__(self, num_experts: int, erased: Sequence[int], kind: DecoderKind) -> None:
        super().__init__(num_experts, erased, kind)
        for name in ("coefficients", "input_mean", "target_mean"):
            self.register_buffer(name, None)

    def fit(self, calibration: Answers) -> Self:
        """Fit the regression; see the class."""
        super().fit(calibration)
        targets = double(calibration.experts[list(self.erased)])  # [|erased|, P, C]
        fit = fit_blocks(self._blocks(calibration), targets)
        self.coefficients = fit.coefficients
        self.input_mean = fit.input_mean
        self.target_mean = fit.target_mean
        self.samples_read = calibration.num_samples
        return self

    def _decode(self, answers: Answers) -> Tensor:
        inputs = torch.cat(self._blocks(answers), 1)  # [B, D]
        found = inputs.shape[1]
        fitted = len(self.input_mean)
        if found != fitted:
            expected = f"{fitted}, as fitted; fit it on answers of the same servers"
            raise DecodingError(f"found answers of {found} numbers, expected {expected}")
        centred = inputs - self.input_mean.to(inputs.device)
        decoded = centred @ self.coefficients.to(inputs.device) + self.target_mean.to(inputs.device)
        classes = decoded.shape[1] // len(self.erased)
        logits = decoded.reshape(len(decoded), len(self.erased), classes)
        return logits.transpose(0, 1).to(answers.experts)

    def _blocks(self, answers: Answers) -> list[Tensor]:
        """Return the regressions' inputs ``[B, ·]`` in float64: all logits, then each network's features."""
        logits = [*answers.coded, *answers.experts[list(self.survivors)]]
        if not logits:
            raise DecodingError(
                "no survivor is read and no coded model answers; lose fewer or add models"
            )
        blocks = [torch.cat(logits, 1)]
        if self.kind.reads_features:
            assert answers.coded_features is not None
            assert answers.expert_features is not None
            blocks += answers.coded_features
            blocks += [answers.expert_features[expert] for expert in self.survivors]
        return [double(block) for block in blocks]
