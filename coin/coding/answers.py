"""What the servers answer for one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from coin.errors import DecodingError


@dataclass(frozen=True)
class Answers:
    """The outputs of all experts and coded models for the same inputs.

    The entries of a lost expert may hold anything, NaN included: no decoder reads them. To lose an expert whose
    class count is smaller than the largest, pad its logits with zeros.

    Args:
        experts: Logits ``[N, B, C]``, padded with zeros to the largest class count C.
        coded: Logits of the coded models ``[R, B, C]``; R is 0 for the row ``method: none``.
        expert_features: One ``[B, F]`` per expert, or None where servers answer with logits only.
        coded_features: One ``[B, F]`` per coded model, or None; widths may differ between networks.

    Raises:
        DecodingError: The shapes do not fit together.
    """

    experts: Tensor
    coded: Tensor
    expert_features: Sequence[Tensor] | None = None
    coded_features: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        if self.experts.ndim != 3 or self.coded.ndim != 3 or self.experts.shape[1:] != self.coded.shape[1:]:
            raise DecodingError(
                f"found experts' logits {list(self.experts.shape)} and coded logits {list(self.coded.shape)}, "
                "expected [N, B, C] and [R, B, C]"
            )
        if (self.expert_features is None) != (self.coded_features is None):
            raise DecodingError("found features of the experts or of the coded models only, expected both or neither")
        for whose, logits, features in (
            ("experts", self.experts, self.expert_features),
            ("coded models", self.coded, self.coded_features),
        ):
            if features is None:
                continue
            if len(features) != logits.shape[0]:
                raise DecodingError(f"found features of {len(features)} {whose}, expected {logits.shape[0]}")
            for feature in features:
                if feature.ndim != 2 or feature.shape[0] != logits.shape[1]:
                    raise DecodingError(
                        f"found features {list(feature.shape)} of the {whose}, expected [{logits.shape[1]}, F]"
                    )

    @property
    def num_experts(self) -> int:
        """N, lost ones included."""
        return self.experts.shape[0]

    @property
    def num_coded(self) -> int:
        """R, the number of coded models that answered."""
        return self.coded.shape[0]

    @property
    def num_samples(self) -> int:
        """B, the number of inputs."""
        return self.experts.shape[1]

    def without_coded(self) -> Self:
        """Return the experts' answers alone: what the row ``method: none`` decodes from."""
        features = None if self.expert_features is None else ()
        return type(self)(self.experts, self.coded[:0], self.expert_features, features)

    def select(self, samples: Tensor | slice) -> Self:
        """Return the answers for some of the inputs: an index tensor ``[K]``, a mask ``[B]`` or a slice."""
        return type(self)(
            self.experts[:, samples],
            self.coded[:, samples],
            None if self.expert_features is None else [feature[samples] for feature in self.expert_features],
            None if self.coded_features is None else [feature[samples] for feature in self.coded_features],
        )

    @classmethod
    def concatenate(cls, batches: Sequence["Answers"]) -> Self:
        """Return the answers for several batches as one, in their order.

        Raises:
            DecodingError: There is no batch, or the batches differ in networks, classes or features.
        """
        if not batches:
            raise DecodingError("found no batches of answers, expected at least one")
        first = batches[0]
        for batch in batches[1:]:
            same = (batch.num_experts, batch.num_coded, batch.experts.shape[2]) == (
                first.num_experts,
                first.num_coded,
                first.experts.shape[2],
            )
            if not same or (batch.expert_features is None) != (first.expert_features is None):
                raise DecodingError("the batches of answers differ in networks, classes or features, expected the same")
        return cls(
            torch.cat([batch.experts for batch in batches], dim=1),
            torch.cat([batch.coded for batch in batches], dim=1),
            _joined([batch.expert_features for batch in batches]),
            _joined([batch.coded_features for batch in batches]),
        )


def _joined(batches: Sequence[Sequence[Tensor] | None]) -> list[Tensor] | None:
    present = [batch for batch in batches if batch is not None]
    if not present:
        return None
    return [torch.cat(parts) for parts in zip(*present, strict=True)]
