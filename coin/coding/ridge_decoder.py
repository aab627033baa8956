"""The calibrated decoders: ridge regression from what arrives to the lost experts' logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from coin.coding.answers import Answers
from coin.coding.decoder import Decoder
from coin.coding.decoder_config import DecoderConfig, DecoderKind, FittedOn
from coin.coding.projection import Projection, fit_projection
from coin.coding.ridge import RidgeFit, fit_ridge
from coin.errors import DecodingError, NumericalError


@dataclass(frozen=True)
class _Regression:
    """One ridge regression, on inputs divided by the scale of their block ``[D]``."""

    scales: Tensor
    fit: RidgeFit


class RidgeDecoder(Decoder):
    """Ridge regression from the arriving logits to the lost experts' logits.

    Inputs are the logits of the coded models and of the surviving experts side by side, targets the lost experts' own
    logits on the same calibration inputs; both are centred, and each lost expert gets the ridge with the smallest
    leave-one-out error (`fit_ridge`). It works with any number of coded models, none included, and has no erasure
    budget: something must arrive, that is all. All arithmetic is in float64.

    With ``fitted_on: own`` each lost expert has a regression of its own, scales included, on the calibration inputs of
    its task.
    """

    kind = DecoderKind.ridge

    def __init__(self, num_experts: int, erased: Sequence[int], config: DecoderConfig | None = None) -> None:
        super().__init__(num_experts, erased, config)
        self._regressions: list[_Regression] = []
        self._widths: tuple[int, ...] = ()

    @property
    def fitted(self) -> list[RidgeFit]:
        """The regressions behind the decoder: one for all lost experts, or with ``fitted_on: own`` one for each.

        Raises:
            DecodingError: `fit` has not been called.
        """
        if not self._regressions:
            raise DecodingError(f"the {self.name} decoder is not fitted; call fit with calibration answers first")
        return [regression.fit for regression in self._regressions]

    def fit(self, calibration: Answers) -> Self:
        """Fit the regression; see the class."""
        self._check(calibration)
        blocks = self._blocks(calibration)
        if not blocks:
            raise DecodingError(
                "every expert is lost and no coded model answers: nothing to decode from; lose fewer, or add "
                "coded models"
            )
        chosen = [(self.erased, torch.arange(calibration.num_samples))]
        if self.config.fitted_on is FittedOn.own:
            chosen = [((expert,), self._own(calibration, expert)) for expert in self.erased]
        self._widths = tuple(block.shape[1] for block in blocks)
        self._regressions = [
            _regression([block[samples] for block in blocks], calibration.experts[list(experts)][:, samples])
            for experts, samples in chosen
        ]
        return self

    def samples_read(self, calibration: Answers) -> int:
        """Return how many of the calibration inputs `fit` looks at: all, or those of the lost experts' tasks."""
        if self.config.fitted_on is FittedOn.own:
            return sum(len(self._own(calibration, expert)) for expert in self.erased)
        return calibration.num_samples

    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits; see the class."""
        fits = self.fitted
        self._check(answers)
        blocks = self._blocks(answers)
        widths = tuple(block.shape[1] for block in blocks)
        if widths != self._widths:
            raise DecodingError(
                f"found answers of widths {list(widths)}, the decoder was fitted on {list(self._widths)}; fit it on "
                "answers of the same servers"
            )
        inputs = torch.cat(blocks, 1)
        scales = [regression.scales for regression in self._regressions]
        decoded = torch.cat([fit(inputs / scale) for fit, scale in zip(fits, scales, strict=True)], 1)
        return decoded.reshape(inputs.shape[0], len(self.erased), -1).transpose(0, 1).to(answers.experts)

    def _blocks(self, answers: Answers) -> list[Tensor]:
        """Return what arrives as float64 matrices ``[B, ·]``, each of one kind and one scale."""
        logits = (*answers.coded, *(answers.experts[expert] for expert in self.survivors))
        return [torch.cat(logits, 1).to(torch.float64)] if logits else []

    def _own(self, calibration: Answers, expert: int) -> Tensor:
        """Return the positions of the inputs of a lost expert's task."""
        if calibration.tasks is None:
            raise DecodingError(f"the {self.name} decoder found answers that do not tell their tasks; give it tasks")
        samples = (calibration.tasks == expert).nonzero().flatten()
        if len(samples) < 2:
            raise NumericalError(
                f"found {len(samples)} calibration samples of expert {expert}'s own task, expected at least 2 for the "
                f"{self.name} decoder; raise samples_per_task or use fitted_on: all"
            )
        return samples


@dataclass(frozen=True)
class _Reduction:
    """How one network's features become K numbers: each stage divided by its scale, then projected."""

    scales: Tensor
    projection: Projection

    def __call__(self, stages: Sequence[Tensor]) -> Tensor:
        features = torch.cat(list(stages), 1)
        if features.shape[1] != len(self.scales):
            raise DecodingError(
                f"found {features.shape[1]} features, the decoder was fitted on {len(self.scales)}; fit it on answers "
                "of the same servers"
            )
        return self.projection(features / self.scales)


class FeatureRidgeDecoder(RidgeDecoder):
    """Ridge regression from the arriving logits and features to the lost experts' logits.

    As `RidgeDecoder`, with the features of every arriving network beside the logits: the penultimate ones, or with
    ``features: stages`` those of all stages. All logits together, and each stage of each network, are blocks that are
    divided by their root mean square deviation: logits and features differ in unit and size, while within a block a
    small feature is one that carries little and should stay small.

    With `components` each network's features, every stage divided by its scale, are first reduced to that many numbers
    by a `fit_projection` on all calibration answers, whatever the regression is fitted on: a server sends the same
    numbers whoever is lost. Random directions are the same for all networks of one width, so that what holds between
    the features of coded models and experts holds between the reduced ones.

    Raises:
        DecodingError: The answers hold no features, or those of one stage where several are asked for.
    """

    kind = DecoderKind.feature_ridge

    def __init__(self, num_experts: int, erased: Sequence[int], config: DecoderConfig | None = None) -> None:
        super().__init__(num_experts, erased, config)
        self._reductions: list[_Reduction] = []

    def fit(self, calibration: Answers) -> Self:
        """Fit the projections, then the regression; see the class."""
        self._check(calibration)
        components = self.config.components
        if components is not None:
            self._reductions = []
            for stages in self._arriving(calibration):
                scales = _scales(stages)
                features = torch.cat(list(stages), 1) / scales
                projection = fit_projection(features, components, self.config.projection)
                self._reductions.append(_Reduction(scales, projection))
        return super().fit(calibration)

    def samples_read(self, calibration: Answers) -> int:
        """Return how many of the calibration inputs `fit` looks at; a projection looks at all."""
        return calibration.num_samples if self.config.components is not None else super().samples_read(calibration)

    def _blocks(self, answers: Answers) -> list[Tensor]:
        arriving = self._arriving(answers)
        if self.config.components is None:
            blocks = [stage for stages in arriving for stage in stages]
        else:
            blocks = [reduce(stages) for reduce, stages in zip(self._reductions, arriving, strict=True)]
        return [*super()._blocks(answers), *blocks]

    def _arriving(self, answers: Answers) -> list[tuple[Tensor, ...]]:
        """Return the chosen features of every network that is not lost, by stage, in float64."""
        if answers.expert_features is None or answers.coded_features is None:
            raise DecodingError(f"the {self.name} decoder found answers without features, expected features and logits")
        features = (*answers.coded_features, *(answers.expert_features[expert] for expert in self.survivors))
        stages = [answers.stages(feature.to(torch.float64)) for feature in features]
        if not self.config.reads_stages:
            return [each[-1:] for each in stages]
        if len(answers.feature_widths or ()) < 2:
            raise DecodingError(f"the {self.name} decoder found features of one stage, expected several; use the last")
        return stages


def _regression(blocks: Sequence[Tensor], targets: Tensor) -> _Regression:
    """Fit lost experts' logits ``[K, P, C]`` to the blocks ``[P, ·]``, each divided by its scale."""
    scales = _scales(blocks)
    side_by_side = targets.transpose(0, 1).reshape(targets.shape[1], -1)
    return _Regression(scales, fit_ridge(torch.cat(list(blocks), 1) / scales, side_by_side, groups=len(targets)))


def _scales(blocks: Sequence[Tensor]) -> Tensor:
    """Return every column's divisor: the root mean square deviation of its block, 1 for a constant block."""
    deviations = [(block - block.mean(0)).square().mean().sqrt().expand(block.shape[1]) for block in blocks]
    scales = torch.cat(deviations)
    return torch.where(scales > 0, scales, torch.ones_like(scales))
