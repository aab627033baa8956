"""The calibrated decoders, of logits alone or with features: ridge regressions fitted on calibration answers."""

from collections.abc import Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor

from coin.coding.answers import Answers
from coin.coding.decoder import Decoder, FeatureCache, second_moments
from coin.coding.decoder_config import DecoderConfig, FittedOn
from coin.coding.ridge import Projection, RidgeFit, block_kernel, fit_blocks, project_blocks
from coin.errors import DecodingError


class RidgeDecoder(Decoder):
    """The calibrated decoders: ridge regression from what arrives to the lost experts' logits, in float64.

    Inputs are the logits of the coded models and of the surviving experts side by side, targets the lost experts' own
    logits on the same calibration inputs; both are centred, and each lost expert gets the ridge with the smallest
    leave-one-out error (`fit_ridge`). It works with any number of coded models, none included, and has no erasure
    budget: something must arrive, that is all. With ``survivors: false`` the coded models alone are read.

    As ``feature_ridge`` it reads the features of every arriving network too. All logits together, and each stage of
    each network, are blocks that are divided by their scale (`fit_blocks`): they differ in unit and size. With
    `components` each network's features are first reduced to that many numbers by a `fit_projection` on all calibration
    answers, whatever the regression is fitted on: a server sends the same numbers whoever is lost. With
    ``fitted_on: own`` each lost expert has a regression of its own, on the calibration inputs of its task.
    """

    def __init__(self, num_experts: int, erased: Sequence[int], config: DecoderConfig) -> None:
        super().__init__(num_experts, erased, config)
        self.fitted: list[RidgeFit] = []
        """The regressions: one for all lost experts, or with ``fitted_on: own`` one for each."""
        self.projections: list[Projection] = []
        """With `components`: of every network that arrives, coded models first."""
        self.widths: list[list[int]] = []
        """What arrived in `fit`: of all logits, and of every network's stages."""

    def fit(self, calibration: Answers, kept: FeatureCache | None = None) -> Self:
        """Fit the projections, if any, then the regressions; see the class."""
        self._check(calibration, fitting=True)
        kept = kept or FeatureCache()
        arrived = self._arrived(calibration, kept)
        if not arrived:
            whose = "every expert is lost" if self.config.reads_survivors else "no survivor is read"
            raise DecodingError(
                f"{whose} and no coded model answers: nothing to decode from; lose fewer, or add coded models"
            )
        self.widths = _widths(arrived)
        components, kind = self.config.components, self.config.projection
        if components is not None:
            self.projections = [
                kept.of(stages[0], (len(stages), components, kind), partial(project_blocks, stages, components, kind))
                for stages in arrived[1:]
            ]
        blocks = self._blocks(arrived)
        if self.config.fitted_on is FittedOn.all:

            def kernel_of(block: Tensor) -> Tensor:
                make = partial(block_kernel, block)
                return make() if block is blocks[0] else kept.of(block, "kernel", make)

            def fit(lost: Sequence[int]) -> RidgeFit:
                return fit_blocks(blocks, calibration.experts[list(lost)], kernel_of)

            readable = bool(torch.isfinite(calibration.experts).all())  # of experts that are not lost too
            if self.survivors or components is not None or len(blocks) < 2 or not readable:
                self.fitted = [fit(self.erased)]
            else:  # it reads the same whoever is lost: one decomposition for all losses
                same = (self.config.name, *map(id, blocks[1:]))
                every = kept.of(blocks[-1], same, partial(fit, range(self.num_experts)))
                self.fitted = [every.of_groups(self.erased, self.num_experts)]
            self.samples_read = dict.fromkeys(self.erased, calibration.num_samples)
        else:
            own = self._own_samples(calibration)
            self.fitted = [
                fit_blocks([block[samples] for block in blocks], calibration.experts[[expert]][:, samples])
                for expert, samples in own.items()
            ]
            self.samples_read = {expert: len(samples) for expert, samples in own.items()}
        shape = (-1, calibration.experts.shape[2])
        left_out = [fit.left_out.reshape(len(fit.left_out), *shape).transpose(0, 1) for fit in self.fitted]
        self.moments = torch.cat([second_moments(errors) for errors in left_out])
        return self

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The regressions and the projections."""
        maps: dict[str, RidgeFit | Projection] = {f"fitted.{place}": each for place, each in enumerate(self.fitted)}
        maps |= {f"projections.{place}": each for place, each in enumerate(self.projections)}
        return {f"{name}.{part}": getattr(each, part) for name, each in maps.items() for part in each.kept}

    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits; see the class."""
        self._check(answers)
        arrived = self._arrived(answers, FeatureCache())
        if (found := _widths(arrived)) != self.widths:
            raise DecodingError(
                f"found answers of widths {found}, the decoder was fitted on {self.widths}; fit it on answers of the "
                "same servers"
            )
        inputs = torch.cat(self._blocks(arrived), 1)
        decoded = torch.cat([fit(inputs) for fit in self.fitted], 1)
        return decoded.reshape(len(inputs), len(self.erased), -1).transpose(0, 1).to(answers.experts)

    def _arrived(self, answers: Answers, kept: FeatureCache) -> list[list[Tensor]]:
        """Return what arrives, in float64: all logits as one block ``[B, ·]``, then each network's stages as blocks."""
        logits = [*answers.coded, *answers.experts[list(self.survivors)]]
        arrived = [[torch.cat(logits, 1).double()]] if logits else []
        if not self.config.reads_features:
            return arrived
        if answers.expert_features is None or answers.coded_features is None:
            raise self._without_features()
        if self.config.reads_stages and len(answers.feature_widths or ()) < 2:
            raise DecodingError(
                f"the {self.config.name} decoder found features of one stage, expected several; use the last"
            )
        first = 0 if self.config.reads_stages else -1
        for features in (*answers.coded_features, *(answers.expert_features[expert] for expert in self.survivors)):
            stages = list(enumerate(answers.stages(features)))[first:]
            arrived.append([kept.of(features, place, stage.double) for place, stage in stages])
        return arrived

    def _blocks(self, arrived: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the inputs of the regressions ``[B, ·]``, each of one kind and one scale."""
        logits, *networks = arrived
        if self.config.components is None:
            return [*logits, *(stage for stages in networks for stage in stages)]
        pairs = zip(self.projections, networks, strict=True)
        return [*logits, *(project(torch.cat(list(stages), 1)) for project, stages in pairs)]


def _widths(arrived: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    return [[block.shape[1] for block in blocks] for blocks in arrived]
