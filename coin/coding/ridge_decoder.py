"""The calibrated decoders, of logits alone or with features: ridge regressions fitted on calibration answers."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from coin.coding.answers import Answers
from coin.coding.decoder import Decoder
from coin.coding.decoder_config import DecoderConfig, FittedOn
from coin.coding.ridge import fit_blocks
from coin.core.devices import double
from coin.errors import DecodingError, NumericalError

_FITTED = ("coefficients", "input_mean", "target_mean")


class RidgeDecoder(Decoder):
    """The calibrated decoders: ridge regression from what arrives to the lost experts' logits, in float64.

    Inputs are the logits of the coded models and of the surviving experts side by side, targets the lost experts' own
    logits on the same calibration inputs; both are centred, and each lost expert gets the ridge with the smallest
    leave-one-out error (`fit_ridge`). It works with any number of coded models, none included, and has no erasure
    budget: something must arrive, that is all. With ``survivors: false`` the coded models alone are read.

    As ``feature_ridge`` it reads the features of every arriving network too. All logits together, and the features of
    each network, are blocks that are divided by their scale (`fit_blocks`): they differ in unit and size. With
    ``fitted_on: own`` each lost expert has a regression of its own, on the calibration inputs of its task.

    The buffers are tensors of `RidgeFit`, stacked: of one regression for all lost experts ``[1, D, |erased|·C]``, or
    with ``fitted_on: own`` of one for each ``[|erased|, D, C]``.
    """

    coefficients: Tensor
    input_mean: Tensor
    target_mean: Tensor

    def __init__(self, num_experts: int, erased: Sequence[int], config: DecoderConfig) -> None:
        super().__init__(num_experts, erased, config)
        for name in _FITTED:
            self.register_buffer(name, None)

    def fit(self, calibration: Answers) -> Self:
        """Fit the regressions; see the class."""
        calibration = calibration.with_float64()
        super().fit(calibration)
        blocks = self._blocks(calibration)
        fits = []
        if self.config.fitted_on is FittedOn.all:
            targets = calibration.experts[list(self.erased)]  # [|erased|, P, C]
            fits.append(fit_blocks(blocks, targets))
            self.samples_read = dict.fromkeys(self.erased, calibration.num_samples)
        else:
            for expert in self.erased:
                samples = self._own_samples(calibration, expert)
                targets = calibration.experts[[expert]][:, samples]  # [1, P, C]
                fits.append(fit_blocks([block[samples] for block in blocks], targets))
                self.samples_read[expert] = len(samples)
        for name in _FITTED:
            setattr(self, name, torch.stack([getattr(fit, name) for fit in fits]))
        return self

    def _decode(self, answers: Answers) -> Tensor:
        inputs = torch.cat(self._blocks(answers), 1)  # [B, D]
        found = inputs.shape[1]
        fitted = self.input_mean.shape[1]
        if found != fitted:
            told = f"found answers of {found} numbers, the decoder was fitted on {fitted}"
            raise DecodingError(f"{told}; fit it on answers of the same servers")
        coefficients, mean, target = (getattr(self, name).to(inputs.device) for name in _FITTED)
        centred = inputs - mean[:, None]  # [1 or |erased|, B, D]
        decoded = centred @ coefficients + target[:, None]
        experts_each = len(self.erased) // len(decoded)  # that one regression is for
        of_expert: Tensor = decoded.unflatten(2, (experts_each, -1)).transpose(1, 2)
        return of_expert.flatten(0, 1).to(answers.experts)

    def _blocks(self, answers: Answers) -> list[Tensor]:
        """Return the regressions' inputs ``[B, ·]`` in float64: all logits, then each network's features."""
        logits = [*answers.coded, *answers.experts[list(self.survivors)]]
        if not logits:
            raise DecodingError(
                "no survivor is read and no coded model answers; lose fewer experts or add coded models"
            )
        blocks = [torch.cat(logits, 1)]
        if self.config.reads_features:
            assert answers.coded_features is not None
            assert answers.expert_features is not None
            blocks += answers.coded_features
            blocks += [answers.expert_features[expert] for expert in self.survivors]
        return [double(block) for block in blocks]

    def _own_samples(self, calibration: Answers, expert: int) -> Tensor:
        """Return the positions of the inputs of a lost expert's own task, int64."""
        if calibration.tasks is None:
            raise DecodingError(f"{self.config.name} decoder found answers that do not tell their tasks; give it tasks")
        samples = (calibration.tasks == expert).nonzero().flatten()
        if len(samples) < 2:
            told = f"found {len(samples)} calibration samples of expert {expert}'s own task, expected at least 2"
            advice = f"for the {self.config.name} decoder; raise samples_per_task or use fitted_on: all"
            raise NumericalError(f"{told} {advice}")
        return samples
