"""Decoders: the outputs that did arrive → the outputs of the lost experts. None of them needs a label."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from typing import Self

import torch
from torch import Tensor

from coin.coding.answers import Answers
from coin.coding.code import MAX_AMPLIFICATION, Code, check_erasure
from coin.coding.ridge import RidgeFit, fit_ridge
from coin.errors import DecodingError


class DecoderKind(StrEnum):
    """How lost outputs are computed from the ones that arrived."""

    linear = "linear"
    """The paper's: solve the code's equations for the lost outputs. Needs no calibration."""
    ridge = "ridge"
    """Ridge regression from all arriving logits to the lost logits, fitted on calibration data."""
    feature_ridge = "feature_ridge"
    """The same from the arriving logits and penultimate features."""


class Decoder(ABC):
    """Computes the outputs of a fixed set of lost experts.

    Args:
        num_experts: N.
        erased: Indices of the lost experts, in the order in which `decode` returns them.

    Raises:
        DecodingError: `erased` is empty, or names an expert twice or one that does not exist.
    """

    kind: DecoderKind

    def __init__(self, num_experts: int, erased: Sequence[int]) -> None:
        self.erased = check_erasure(erased, num_experts)
        self.survivors = tuple(expert for expert in range(num_experts) if expert not in self.erased)
        self.num_experts = num_experts

    @property
    def needs_fit(self) -> bool:
        """Whether `fit` must come before `decode`."""
        return True

    @abstractmethod
    def fit(self, calibration: Answers) -> Self:
        """Learn from answers to calibration inputs, the lost experts' own logits being the targets.

        Raises:
            DecodingError: The answers come from another number of experts, or nothing arrives to decode from.
            NumericalError: There are fewer than two samples, or a value is not finite.
        """

    @abstractmethod
    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits ``[len(erased), B, C]`` in the type of the answers.

        The lost experts' entries in `answers` are not read.

        Raises:
            DecodingError: The decoder was not fitted, or the answers do not fit it.
        """

    def _check(self, answers: Answers) -> None:
        if answers.num_experts != self.num_experts:
            raise DecodingError(
                f"found answers of {answers.num_experts} experts, the decoder is for {self.num_experts}"
            )


def decode_linear(matrix: Tensor, coded: Tensor, survivors: Tensor, erased: Sequence[int]) -> Tensor:
    """Solve the code's equations for the lost outputs, in the least-squares sense.

    f̂_E = B_E⁺ (f_c − B_S f_S) with B_E, B_S the columns of the lost and the surviving experts. One row and one lost
    expert j: (f_c − Σ_{i≠j} β_i f_i)/β_j, the paper's decoder (arXiv 2409.01420, section II).

    Args:
        matrix: Rows of the code whose coded models answered ``[R, N]``.
        coded: Their outputs ``[R, B, C]``.
        survivors: Outputs of the experts not in `erased`, in ascending order ``[N − |erased|, B, C]``.
        erased: Indices of the lost experts.

    Returns:
        ``[|erased|, B, C]``, in the type of `coded`.

    Raises:
        DecodingError: More experts are lost than coded models answered, or the columns of the lost experts are
            linearly dependent.
    """
    erased = check_erasure(erased, matrix.shape[1])
    present = [expert for expert in range(matrix.shape[1]) if expert not in erased]
    if len(erased) > matrix.shape[0]:
        raise DecodingError(
            f"{len(erased)} experts are lost but {matrix.shape[0]} coded models answered, expected at least as many; "
            "add rows to the code or use a calibrated decoder"
        )
    weights = matrix.to(torch.float64)
    columns = weights[:, list(erased)]
    smallest = float(torch.linalg.svdvals(columns)[-1])
    if smallest * MAX_AMPLIFICATION < 1:
        raise DecodingError(
            f"the code's columns for the lost experts {list(erased)} are linearly dependent (smallest singular value "
            f"{smallest:.3g}), expected at least {1 / MAX_AMPLIFICATION:.0e}; choose another code"
        )
    inverse = torch.linalg.pinv(columns)
    # One matrix for both parts, made in float64 and rounded once.
    from_survivors = -(inverse @ weights[:, present])
    decoded: Tensor = torch.tensordot(inverse.to(coded), coded, dims=1)
    if present:
        decoded = decoded + torch.tensordot(from_survivors.to(coded), survivors.to(coded), dims=1)
    return decoded


class LinearDecoder(Decoder):
    """The paper's decoder, by `decode_linear` over all rows of the code; exact when the coded outputs are.

    Args:
        code: The code.
        erased: Indices of the lost experts, at most R.

    Raises:
        DecodingError: The erasure is past the budget, or the code is singular on it.
    """

    kind = DecoderKind.linear

    def __init__(self, code: Code, erased: Sequence[int]) -> None:
        super().__init__(code.num_experts, erased)
        if len(self.erased) > code.max_erasures:
            raise DecodingError(
                f"{len(self.erased)} experts are lost, the code decodes at most {code.max_erasures}; "
                "add rows to the code or use a calibrated decoder"
            )
        self.code = code

    @property
    def needs_fit(self) -> bool:
        """False: the code says it all."""
        return False

    def fit(self, calibration: Answers) -> Self:
        """Do nothing: the code says it all."""
        return self

    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits; see `decode_linear`."""
        self._check(answers)
        if answers.num_coded != self.code.num_coded:
            raise DecodingError(
                f"found answers of {answers.num_coded} coded models, the code has {self.code.num_coded}"
            )
        survivors = answers.experts[list(self.survivors)]
        return decode_linear(self.code.matrix.to(answers.coded.device), answers.coded, survivors, self.erased)


class RidgeDecoder(Decoder):
    """Ridge regression from the arriving logits to the lost experts' logits.

    Inputs are the logits of the coded models and of the surviving experts side by side, targets the lost experts' own
    logits on the same calibration inputs; both are centred, and each lost expert gets the ridge with the smallest
    leave-one-out error (`fit_ridge`). It works with any number of coded models, none included, and has no erasure
    budget: something must arrive, that is all. All arithmetic is in float64.
    """

    kind = DecoderKind.ridge

    def __init__(self, num_experts: int, erased: Sequence[int]) -> None:
        super().__init__(num_experts, erased)
        self._fitted: RidgeFit | None = None
        self._widths: tuple[int, ...] = ()
        self._scales: Tensor | None = None

    @property
    def fitted(self) -> RidgeFit:
        """The regression behind the decoder, on inputs divided by the scale of their block.

        Raises:
            DecodingError: `fit` has not been called.
        """
        if self._fitted is None:
            raise DecodingError(f"the {self.kind} decoder is not fitted; call fit with calibration answers first")
        return self._fitted

    def fit(self, calibration: Answers) -> Self:
        """Fit the regression; see the class."""
        self._check(calibration)
        blocks = self._blocks(calibration)
        if not blocks:
            raise DecodingError("every expert is lost and no coded model answers: nothing to decode from")
        targets = calibration.experts[list(self.erased)]
        scales = torch.cat([_block_scale(block).expand(block.shape[1]) for block in blocks])
        self._widths = tuple(block.shape[1] for block in blocks)
        self._scales = scales
        self._fitted = fit_ridge(torch.cat(blocks, 1) / scales, _side_by_side(targets), groups=len(self.erased))
        return self

    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits; see the class."""
        fitted = self.fitted
        self._check(answers)
        blocks = self._blocks(answers)
        widths = tuple(block.shape[1] for block in blocks)
        if widths != self._widths:
            raise DecodingError(
                f"found answers of widths {list(widths)}, the decoder was fitted on {list(self._widths)}"
            )
        assert self._scales is not None
        inputs = torch.cat(blocks, 1)
        decoded = fitted(inputs / self._scales)
        return decoded.reshape(inputs.shape[0], len(self.erased), -1).transpose(0, 1).to(answers.experts)

    def _blocks(self, answers: Answers) -> list[Tensor]:
        """Return what arrives as float64 matrices ``[B, ·]``, each of one kind and one scale."""
        logits = (*answers.coded, *(answers.experts[expert] for expert in self.survivors))
        return [torch.cat(logits, 1).to(torch.float64)] if logits else []


class FeatureRidgeDecoder(RidgeDecoder):
    """Ridge regression from the arriving logits and features to the lost experts' logits.

    As `RidgeDecoder`, with the penultimate features of every arriving network beside the logits. All logits together,
    and the features of each network, are blocks that are divided by their root mean square deviation: logits and
    features differ in unit and size, while within a block a small feature is one that carries little and should stay
    small.

    Raises:
        DecodingError: The answers hold no features.
    """

    kind = DecoderKind.feature_ridge

    def _blocks(self, answers: Answers) -> list[Tensor]:
        if answers.expert_features is None or answers.coded_features is None:
            raise DecodingError(f"the {self.kind} decoder found answers without features, expected features and logits")
        features = (*answers.coded_features, *(answers.expert_features[expert] for expert in self.survivors))
        return [*super()._blocks(answers), *(feature.to(torch.float64) for feature in features)]


def make_decoder(kind: DecoderKind | str, code: Code, erased: Sequence[int]) -> Decoder:
    """Return an unfitted decoder.

    The calibrated kinds read only the number of experts from the code, so they serve ``method: none`` (no coded
    answers) as they are.

    Raises:
        DecodingError: There is no such kind, or it cannot decode the erasure.
    """
    try:
        kind = DecoderKind(kind)
    except ValueError as error:
        raise DecodingError(f"found decoder '{kind}', expected one of {', '.join(DecoderKind)}") from error
    if kind is DecoderKind.linear:
        return LinearDecoder(code, erased)
    decoder = {DecoderKind.ridge: RidgeDecoder, DecoderKind.feature_ridge: FeatureRidgeDecoder}[kind]
    return decoder(code.num_experts, erased)


def _block_scale(block: Tensor) -> Tensor:
    """Return the root mean square deviation of a block ``[B, D]`` from its column means, 1 for a constant block."""
    scale = (block - block.mean(0)).square().mean().sqrt()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _side_by_side(logits: Tensor) -> Tensor:
    """Return ``[K, B, C]`` as ``[B, K·C]``."""
    return logits.transpose(0, 1).reshape(logits.shape[1], -1)
