"""The decoders: the outputs that did arrive → the outputs of the lost experts, without a label."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from coin.coding.answers import Answers
from coin.coding.code import Code, check_erasure, decode_linear
from coin.coding.decoder_config import DecoderConfig, DecoderKind, FittedOn
from coin.coding.promise import Promise, promised_risk
from coin.coding.ridge import Projection, RidgeFit, block_kernel, fit_blocks, fit_ridge, project_blocks
from coin.coding.risk import decoding_risk
from coin.errors import ConfigurationError, DecodingError, NumericalError

Made = TypeVar("Made")
Head = tuple[Tensor, Tensor]
"""A classifier head's weight ``[C, F]`` and bias ``[C]``, padded with zeros to the largest class count."""


class FeatureCache:
    """What fitting decoders has made of the networks' features, for all that are fitted on the same ones."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Tensor, Any]] = {}

    def of(self, source: Tensor, what: Hashable, make: Callable[[], Made]) -> Made:
        """Return what was made of this very tensor before, or make it."""
        key = (id(source), what)
        if key not in self._made:
            self._made[key] = source, make()  # the source is held: no other tensor gets its id
        made: Made = self._made[key][1]
        return made


class Decoder(ABC):
    """Computes the outputs of a fixed set of lost experts, `erased`, in their order.

    Raises DecodingError where `erased` is empty, or names an expert twice or one that does not exist.
    """

    needs_fit = True
    """Whether `fit` must come before `decode`."""

    def __init__(self, num_experts: int, erased: Sequence[int], config: DecoderConfig) -> None:
        self.config = config
        self.erased = check_erasure(erased, num_experts)
        left = tuple(expert for expert in range(num_experts) if expert not in self.erased)
        self.survivors = left if config.reads_survivors else ()
        """The experts whose answers `decode` reads."""
        self.num_experts = num_experts
        self.samples_read = 0
        """How many of the calibration inputs `fit` has looked at."""
        self.moments: Tensor | None = None
        """`errors`, once they are known."""
        self.promises: dict[int, Promise] = {}
        """By lost expert, up to which risk its decoded answers are accepted."""

    def fit(self, calibration: Answers, kept: FeatureCache | None = None) -> Self:
        """Learn from answers to calibration inputs, the lost experts' own logits being the targets, if anything.

        One `kept` saves work for the decoders of several systems and erasures that are fitted on the same answers.
        Here nothing is learnt but the errors that the decoder makes.

        Raises:
            DecodingError: The answers come from another number of experts, nothing arrives to decode from, or the
                answers lack the features, stages or tasks that the options ask for.
            NumericalError: There are fewer than two samples, or a value is not finite.
        """
        errors = self.decode(calibration) - calibration.experts[list(self.erased)]
        if odd := (~torch.isfinite(errors).all(2).all(0)).nonzero().flatten().tolist():
            raise NumericalError(
                f"sample {odd[0]} of the calibration answers holds a NaN or an infinity ({len(odd)} of "
                f"{calibration.num_samples}), expected finite logits; leave it out"
            )
        self.moments = _second_moments(errors)
        return self

    @abstractmethod
    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits ``[len(erased), B, C]``, whose own entries are not read, in their type.

        Raises:
            DecodingError: The decoder was not fitted, or the answers do not fit it.
        """

    def rows(self, num_coded: int) -> tuple[int, ...]:
        """Return the coded models whose answers `decode` reads."""
        return tuple(range(num_coded))

    @property
    def tensors(self) -> list[Tensor]:
        """What `decode` computes with, and so must be kept."""
        return []

    @property
    def nbytes(self) -> int:
        """How many bytes these are."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def passes(self, num_coded: int) -> int:
        """Return how many forward passes the answers took that `fit` has looked at."""
        return (len({*self.erased, *self.survivors}) + num_coded) * self.samples_read

    @property
    def errors(self) -> Tensor:
        """E e eᵀ of the errors e = f̂ − f of each lost expert ``[|erased|, C, C]``.

        The mean is over the calibration inputs of `fit`, each of them left out of the regression that decodes it.

        Raises:
            DecodingError: There was no `fit`, which the linear decoder needs for this too.
        """
        if self.moments is None:
            raise DecodingError(f"the {self.config.name} decoder knows no errors; call fit with calibration answers")
        return self.moments

    def risk(self, expert: int, decoded: Tensor, num_classes: int | None = None) -> Tensor:
        """Return the risk of a lost expert's decoded logits ``[B, C]``, of which it has `num_classes`: `decoding_risk`.

        Raises as `errors`.
        """
        errors = self.errors[self.erased.index(expert)]
        return decoding_risk(decoded[:, :num_classes], errors[:num_classes, :num_classes])

    def accept(
        self, answers: Answers, alpha: float, confidence: float = 0.95, num_classes: Sequence[int] | None = None
    ) -> dict[int, Promise]:
        """Set and return the risk up to which each lost expert's decoded answers are accepted: `promised_risk`.

        Args:
            answers: Answers, including the lost experts' own, to inputs not used to fit networks or decoder. If they
                have tasks, every lost expert's promise uses its own task's inputs.
            alpha: α, the largest probability that an accepted answer differs, in (0, 1).
            confidence: In (0, 1).
            num_classes: Of every expert.

        Raises as `errors` and `promised_risk`.
        """
        for place, expert in enumerate(self.erased):
            own = answers if answers.tasks is None else answers.select(answers.tasks == expert)
            width = num_classes[expert] if num_classes else None
            decoded, wanted = self.decode(own)[place][:, :width], own.experts[expert][:, :width]
            differs = (decoded.argmax(1) != wanted.argmax(1)) | ~torch.isfinite(decoded).all(1)
            self.promises[expert] = promised_risk(self.risk(expert, decoded, width), differs, alpha, confidence)
        return self.promises

    def accepted(self, expert: int, risk: Tensor) -> Tensor:
        """Return whether a lost expert's decoded answers of this risk ``[B]`` are accepted, bool: none are unpromised.

        Raises:
            DecodingError: `accept` was not called.
        """
        if expert not in self.promises:
            raise DecodingError(f"the {self.config.name} decoder has promised nothing; call accept with new inputs")
        threshold = self.promises[expert].threshold
        return risk <= (-math.inf if threshold is None else threshold)

    def _unfitted(self) -> DecodingError:
        return DecodingError(f"the {self.config.name} decoder is not fitted; call fit with calibration answers first")

    def _without_features(self) -> DecodingError:
        found = f"the {self.config.name} decoder found answers without features"
        return DecodingError(f"{found}, expected features and logits")

    def _check(self, answers: Answers) -> None:
        if answers.num_experts != self.num_experts:
            raise DecodingError(
                f"found answers of {answers.num_experts} experts, the decoder is for {self.num_experts}; keep the lost "
                "ones' places"
            )


class LinearDecoder(Decoder):
    """The paper's decoder, by `decode_linear` over all rows of the code; exact when the coded outputs are."""

    needs_fit = False

    def __init__(self, code: Code, erased: Sequence[int]) -> None:
        super().__init__(code.num_experts, erased, DecoderConfig(DecoderKind.linear))
        if len(self.erased) > code.max_erasures:
            raise DecodingError(
                f"{len(self.erased)} experts are lost, the code decodes at most {code.max_erasures}; "
                "add rows to the code or use a calibrated decoder"
            )
        self.code = code

    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits; see `decode_linear`."""
        self._check(answers)
        if answers.num_coded != self.code.num_coded:
            raise DecodingError(
                f"found answers of {answers.num_coded} coded models, the code has {self.code.num_coded}; give all of "
                "them, or a code of those rows"
            )
        survivors = answers.experts[list(self.survivors)]
        return decode_linear(self.code.matrix.to(answers.coded.device), answers.coded, survivors, self.erased)


CORRECTION = -1.5
"""The ridge of an expert head's correction, as the exponent of 10 times the mean squared singular value.

The one of least leave-one-out error corrects too little where errors are few and logits large: it was behind by half a
point with eight experts.
"""


class ExpertHeadDecoder(Decoder):
    """The lost experts' own heads on the penultimate features of the coded model with the largest β for each.

    Exact where the coded model's features are the expert's. No other server is asked, so all experts may be lost.

    With ``fitted_on: own`` the head (W, b) becomes (W + ΔW, b + Δb): ΔW φ + Δb is the ridge regression, with the ridge
    `CORRECTION`, of what the expert says on its own task's calibration inputs, less Wφ + b, on the coded model's
    features φ there. No label, and as many tensors as without.

    Args:
        code: The code.
        erased: The lost experts.
        heads: Their heads, by expert; `decode` needs them.
        config: The decoder's options.
    """

    def __init__(
        self,
        code: Code,
        erased: Sequence[int],
        heads: Mapping[int, Head] | None = None,
        config: DecoderConfig | None = None,
    ) -> None:
        super().__init__(code.num_experts, erased, config or DecoderConfig(DecoderKind.expert_head))
        self.needs_fit = self.config.fitted_on is FittedOn.own
        self.heads: dict[int, Head] = {expert: heads[expert] for expert in self.erased} if heads else {}
        self._uncorrected = dict(self.heads)
        weights = {expert: code.matrix[:, expert].tolist() for expert in self.erased}
        self.row_of = {expert: column.index(max(column)) for expert, column in weights.items()}
        """Which coded model each lost expert is read from, the first of equals."""

    def fit(self, calibration: Answers, kept: FeatureCache | None = None) -> Self:
        """Correct the heads, if requested, and estimate the errors. See `Decoder.fit`."""
        if not self.needs_fit:
            return super().fit(calibration, kept)
        self._check(calibration)
        own, moments, width = own_samples(self, calibration), [], calibration.experts.shape[2]
        for expert, samples in own.items():
            features = self._read(calibration, expert, self._uncorrected)[samples]
            weight, bias = (part.to(features) for part in self._uncorrected[expert])
            missed = calibration.experts[expert, samples, : len(bias)].double() - linear(features, weight, bias)
            fit = fit_ridge(features, missed, exponents=[CORRECTION])
            shift = fit.target_mean - fit.input_mean @ fit.coefficients
            stored = self._uncorrected[expert][0]
            self.heads[expert] = (weight + fit.coefficients.T).contiguous().to(stored), (bias + shift).to(stored)
            moments.append(_second_moments(pad(fit.left_out, (0, width - len(bias)))[None]))
        self.moments, self.samples_read = torch.cat(moments), sum(map(len, own.values()))
        return self

    def rows(self, num_coded: int) -> tuple[int, ...]:
        """Return the coded models that the lost experts are read from."""
        return tuple(sorted(set(self.row_of.values())))

    @property
    def tensors(self) -> list[Tensor]:
        """The heads."""
        return [tensor for head in self.heads.values() for tensor in head]

    def passes(self, num_coded: int) -> int:
        """Return two for every sample: the expert's, and that of the coded model that it is read from."""
        return 2 * self.samples_read

    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits; see the class."""
        self._check(answers)
        if self.needs_fit and self.moments is None:
            raise self._unfitted()
        decoded = []
        for expert in self.row_of:
            features = self._read(answers, expert, self.heads)
            weight, bias = self.heads[expert]
            logits = linear(features, weight.to(features), bias.to(features))
            decoded.append(pad(logits, (0, max(0, answers.coded.shape[2] - logits.shape[1]))))
        return torch.stack(decoded).to(answers.experts)

    def _read(self, answers: Answers, expert: int, heads: Mapping[int, Head]) -> Tensor:
        """Return the features that a lost expert's head reads ``[B, F]``, in float64."""
        row = self.row_of[expert]
        if not heads:
            raise DecodingError(f"the {self.config.name} decoder has no heads; make it with the lost experts' heads")
        if answers.coded_features is None:
            raise self._without_features()
        if answers.num_coded <= max(self.row_of.values()):
            raise DecodingError(
                f"found answers of {answers.num_coded} coded models, {self.config.name} reads number "
                f"{max(self.row_of.values())}; keep the silent ones' places"
            )
        features, width = answers.stages(answers.coded_features[row])[-1], heads[expert][0].shape[1]
        if features.shape[1] != width:
            raise DecodingError(
                f"found {features.shape[1]} features of coded model {row}, the head of expert {expert} reads "
                f"{width}; use another decoder"
            )
        return features.double()


class RidgeDecoder(Decoder):
    """The calibrated decoders: ridge regression from what arrives to the lost experts' logits.

    Inputs are the logits of the coded models and of the surviving experts side by side, targets the lost experts' own
    logits on the same calibration inputs; both are centred, and each lost expert gets the ridge with the smallest
    leave-one-out error (`fit_ridge`). It works with any number of coded models, none included, and has no erasure
    budget: something must arrive, that is all. All arithmetic is in float64. With ``survivors: false`` the coded models
    alone are read.

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
        self._check(calibration)
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
            logits = blocks[0]

            def kernel_of(block: Tensor) -> Tensor:
                make = partial(block_kernel, block)
                return make() if block is logits else kept.of(block, "kernel", make)

            self.fitted = [fit_blocks(blocks, calibration.experts[list(self.erased)], kernel_of)]
            self.samples_read = calibration.num_samples
        else:
            own = own_samples(self, calibration)
            self.fitted = [
                fit_blocks([block[samples] for block in blocks], calibration.experts[[expert]][:, samples])
                for expert, samples in own.items()
            ]
            read = sum(map(len, own.values()))
            self.samples_read = read if components is None else calibration.num_samples  # a projection looks at all
        shape = (-1, calibration.experts.shape[2])
        left_out = [fit.left_out.reshape(len(fit.left_out), *shape).transpose(0, 1) for fit in self.fitted]
        self.moments = torch.cat([_second_moments(errors) for errors in left_out])
        return self

    @property
    def tensors(self) -> list[Tensor]:
        """The regressions and the projections."""
        fits = [each for fit in self.fitted for each in (fit.coefficients, fit.input_mean, fit.target_mean)]
        return [*fits, *(tensor for each in self.projections for tensor in (each.mean, each.directions))]

    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits; see the class."""
        if not self.fitted:
            raise self._unfitted()
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


def own_samples(decoder: Decoder, calibration: Answers) -> dict[int, Tensor]:
    """Return the positions of the inputs of every lost expert's own task."""
    if calibration.tasks is None:
        raise DecodingError(
            f"the {decoder.config.name} decoder found answers that do not tell their tasks; give it tasks"
        )
    own = {expert: (calibration.tasks == expert).nonzero().flatten() for expert in decoder.erased}
    for expert, samples in own.items():
        if len(samples) < 2:
            raise NumericalError(
                f"found {len(samples)} calibration samples of expert {expert}'s own task, expected at least 2 for "
                f"the {decoder.config.name} decoder; raise samples_per_task or use fitted_on: all"
            )
    return own


def make_decoder(
    kind: DecoderKind | str | DecoderConfig,
    code: Code,
    erased: Sequence[int],
    heads: Sequence[Head] | Mapping[int, Head] | None = None,
) -> Decoder:
    """Return an unfitted decoder of a kind with its default options, or of a configuration.

    The calibrated kinds read only the number of experts from the code, and serve without coded answers too. Raises
    DecodingError where there is no such kind, or it cannot decode the erasure.

    Args:
        kind: The decoder.
        code: The code.
        erased: The lost experts.
        heads: The heads of all experts, or of the lost ones by expert (`coin.networks.linear_heads`): for expert_head.

    >>> answers = coin.Answers(torch.ones(3, 1, 2), coded=2 * torch.ones(1, 1, 2))
    >>> coin.make_decoder("linear", code, erased=[0]).decode(answers)
    tensor([[[4., 4.]]])
    """
    try:
        config = DecoderConfig.of(kind)
    except ConfigurationError as error:
        raise DecodingError(str(error)) from error
    if config.kind is DecoderKind.linear:
        return LinearDecoder(code, erased)
    if config.kind is DecoderKind.expert_head:
        by_expert = dict(enumerate(heads)) if isinstance(heads, Sequence) else heads
        return ExpertHeadDecoder(code, erased, by_expert, config)
    return RidgeDecoder(code.num_experts, erased, config)


def kept_bytes(decoders: Iterable[Decoder]) -> int:
    """Return how many bytes the decoders of several erasures need in all.

    Without survivors an expert is decoded in the same way for every erasure, and is counted once.
    """
    kept, ready = 0, set[int]()
    for decoder in sorted(decoders, key=lambda each: len(each.erased)):
        if decoder.config.reads_survivors or not ready >= {*decoder.erased}:
            kept += decoder.nbytes
            ready |= {*decoder.erased}
    return kept


def _second_moments(errors: Tensor) -> Tensor:
    """Return E e eᵀ ``[K, C, C]`` of errors ``[K, P, C]``."""
    return errors.double().mT @ errors.double() / errors.shape[1]


def _widths(arrived: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    return [[block.shape[1] for block in blocks] for blocks in arrived]
