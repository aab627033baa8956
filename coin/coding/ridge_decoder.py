"""The calibrated decoders, of logits alone or with features: ridge regressions fitted on calibration answers."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from coin.coding.answers import Answers
from coin.coding.decoder import Decoder
from coin.coding.decoder_config import DecoderConfig, FittedOn
from coin.coding.ridge import RidgeFit, fit_blocks
from coin.core.devices import double
from coin.errors import DecodingError


class RidgeDecoder(Decoder):
    """The calibrated decoders: ridge regression from what arrives to the lost experts' logits, in float64.

    Inputs are the logits of the coded models and of the surviving experts side by side, targets the lost experts' own
    logits on the same calibration inputs; both are centred, and each lost expert gets the ridge with the smallest
    leave-one-out error (`fit_ridge`). It works with any number of coded models, none included, and has no erasure
    budget: something must arrive, that is all. With ``survivors: false`` the coded models alone are read.

    As ``feature_ridge`` it reads the features of every arriving network too. All logits together, and the features of
    each network, are blocks that are divided by their scale (`fit_blocks`): they differ in unit and size. With
    ``fitted_on: own`` each lost expert has a regression of its own, on the calibration inputs of its task.

    The buffers are those of `RidgeFit`, stacked: of one regression for all lost experts ``[1, D, |erased|·C]``, or with
    ``fitted_on: own`` of one for each ``[|erased|, D, C]``.
    """

    coefficients: Tensor
    input_mean: Tensor
    target_mean: Tensor

    def __init__(self, num_experts: int, erased: Sequence[int], config: DecoderConfig) -> None:
        super().__init__(num_experts, erased, config)
        for name in RidgeFit.kept:
            self.register_buffer(name, None)

    def fit(self, calibration: Answers) -> Self:
        """Fit the regressions; see the class."""
        calibration = calibration.with_float64()
        super().fit(calibration)
        blocks = self._blocks(calibration)
        if self.config.fitted_on is FittedOn.all:
            fits = [fit_blocks(blocks, calibration.experts[list(self.erased)], self._kernels(calibration))]
            self.samples_read = dict.fromkeys(self.erased, calibration.num_samples)
        else:
            own = self._own_samples(calibration)
            fits = [
                fit_blocks([block[samples] for block in blocks], calibration.experts[[expert]][:, samples])
                for expert, samples in own.items()
            ]
            self.samples_read = {expert: len(samples) for expert, samples in own.items()}
        for name in RidgeFit.kept:
            setattr(self, name, torch.stack([getattr(fit, name) for fit in fits]))
        return self

    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits; see the class."""
        self._check(answers)
        inputs = torch.cat(self._blocks(answers), 1)
        if (found := inputs.shape[1]) != (fitted := self.input_mean.shape[1]):
            told = f"found answers of {found} numbers, the decoder was fitted on {fitted}"
            raise DecodingError(f"{told}; fit it on answers of the same servers")
        coefficients, mean, target = (getattr(self, name).to(inputs.device) for name in RidgeFit.kept)
        decoded = (inputs - mean[:, None]) @ coefficients + target[:, None]  # [1 or |erased|, B, ·]
        each: Tensor = decoded.unflatten(2, (len(self.erased) // len(decoded), -1)).transpose(1, 2)
        return each.flatten(0, 1).to(answers.experts)

    def _blocks(self, answers: Answers) -> list[Tensor]:
        """Return the regressions' inputs ``[B, ·]`` in float64: all logits, then each network's features."""
        logits = [*answers.coded, *answers.experts[list(self.survivors)]]
        if not logits:
            whose = "every expert is lost" if self.config.reads_survivors else "no survivor is read"
            raise DecodingError(f"{whose} and no coded model answers: nothing to decode from; lose fewer or add models")
        features: list[Tensor] = []
        if self.config.reads_features:
            if answers.expert_features is None or answers.coded_features is None:
                raise self._without_features()
            features = [*answers.coded_features, *(answers.expert_features[expert] for expert in self.survivors)]
        return [double(torch.cat(logits, 1)), *map(double, features)]

    def _kernels(self, answers: Answers) -> list[Tensor | None]:
        """Return the blocks' kernels as far as the answers know them."""
        if answers.kernels is None or not self.config.reads_features:
            return []
        count = answers.num_experts
        return [None, *answers.kernels[count:], *(answers.kernels[expert] for expert in self.survivors)]
