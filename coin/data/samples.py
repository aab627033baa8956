"""Labelled samples of a task: subsets of tensors that are read once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from coin.data.sampling import Stream, make_generator, stratified_order
from coin.data.transform import View, augmented
from coin.errors import ConfigurationError


class Samples(Subset[Any]):
    """Labelled samples, which are indices into shared tensors; ``samples[positions]`` is a batch, as is ``samples[:]``.

    Attributes:
        dataset: Images, uint8 [N, C, H, W], or tokens, int64 [N, L], and class indices, int64 [N].
        indices: Which of them are selected, int64 [P].
    """

    dataset: TensorDataset
    indices: Tensor  # type: ignore[assignment]

    @classmethod
    def of(cls, stored: Tensor, labels: Tensor) -> Self:
        """All of these images or tokens, with their class indices, one each."""
        every = torch.arange(len(labels))
        return cls(TensorDataset(stored, labels.long()), every)  # type: ignore[arg-type]

    @property
    def targets(self) -> Tensor:
        """The selected samples' class indices, int64 [P]."""
        return self.dataset.tensors[1][self.indices]

    def subset(self, positions: Tensor | Sequence[int]) -> Self:
        """The samples at these positions of the selection, in this order."""
        chosen = torch.as_tensor(positions, dtype=torch.int64)
        return type(self)(self.dataset, self.indices[chosen])  # type: ignore[arg-type]

    def in_order(self, positions: Tensor) -> Self:
        """The samples at these positions of the selection, in the selection's order."""
        return self.subset(positions.sort().values)

    def batch(self, positions: Tensor, view: View | None = None) -> tuple[Tensor, Tensor]:
        """The samples at these positions, int64 [B], augmented as in a view of the selection, and their labels."""
        stored, labels = self[positions]
        return augmented(stored, view, positions, len(self)), labels


@dataclass(frozen=True)
class Source:
    """The samples that a task reads; of those to train on some are set aside where it has none to test or validate."""

    train: Samples
    test: Samples | None = None
    validation: Samples | None = None


class Splits(NamedTuple):
    """The samples of a task's splits; without a share for validation that is empty."""

    train: Samples
    test: Samples
    validation: Samples


def split_source(
    source: Source,
    share: float,
    seed: int,
    max_train: int | None,
    max_test: int | None,
) -> Splits:
    """Set samples aside where the source brings none, and limit the splits to stratified subsets.

    A fifth is to test on, and a share of the rest to validate on.
    """
    train = source.train
    test = source.test
    if test is None:
        fifth = round(0.2 * len(train))
        order = stratified_order(train.targets, make_generator(seed, Stream.TEST_SPLIT))
        test = train.in_order(order[:fifth])
        train = train.in_order(order[fifth:])
    test_order = stratified_order(test.targets, make_generator(seed, Stream.TEST_SPLIT))
    order = stratified_order(train.targets, make_generator(seed, Stream.TRAIN_SPLIT))
    count = 0
    if source.validation is None and share > 0:
        count = max(1, round(share * len(order)))
    rest = order[count:]
    if not len(rest):
        raise ConfigurationError(
            f"validation_share {share} of {len(order)} samples leaves none; lower it"
        )
    fitted = rest[:max_train]
    if count > 0:
        # Validation shrinks in proportion.
        count = max(1, round(count * len(fitted) / len(rest)))
    validation = source.validation
    if validation is None:
        validation = train.in_order(order[:count])
    return Splits(train.in_order(fitted), test.in_order(test_order[:max_test]), validation)
