"""What a task reads from its source, and how that is split."""

from dataclasses import dataclass

import torch

from coin.data.samples import Samples
from coin.data.sampling import Stream, seeded, stratified_order
from coin.errors import ConfigurationError


@dataclass(frozen=True)
class Source:
    """What a task reads from its source.

    Attributes:
        train: Samples to train on; the validation split comes out of them where the source brings none.
        test: Samples to test on, and nothing else.
        validation: The source's own validation samples.
    """

    train: Samples
    test: Samples
    validation: Samples | None = None


def hold_out(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """Split a source that comes in one piece into training and test samples, stratified.

    Returns:
        The training samples and the ``share`` that is left for testing.
    """
    order = stratified_order(samples.targets, seeded(seed, Stream.TEST_SPLIT))
    count = round(share * len(order))
    return samples.subset(order[count:].sort().values), samples.subset(order[:count].sort().values)


def split_source(
    source: Source, validation_share: float, split_seed: int, max_train: int | None, max_test: int | None
) -> Source:
    """Set the validation samples aside where the source brings none, and keep at most so many of each split.

    All choices are stratified. Reducing a split keeps a subset of it, so no sample ever changes sides.

    Args:
        source: What the source holds.
        validation_share: Share of the training samples to set aside, in [0, 1).
        split_seed: Decides the choices.
        max_train: At most so many training samples; validation shrinks in proportion.
        max_test: At most so many test samples.

    Raises:
        ConfigurationError: The share leaves no sample to train on.
    """
    test = source.test
    if max_test is not None:
        test = _first(test, max_test, seeded(split_seed, Stream.TEST_SPLIT))
    order = stratified_order(source.train.targets, seeded(split_seed, Stream.TRAIN_SPLIT))
    held_out = 0
    if source.validation is None and validation_share > 0:
        held_out = max(1, round(validation_share * len(order)))
        if held_out >= len(order):
            raise ConfigurationError(
                f"validation_share {validation_share} of {len(order)} samples leaves none to train on; expected at "
                "least one; lower it"
            )
    validation, train = order[:held_out], order[held_out:]
    if max_train is not None and max_train < len(train):
        validation = validation[: max(1, round(held_out * max_train / len(train)))]
        train = train[:max_train]
    return Source(
        source.train.subset(train.sort().values),
        test,
        source.train.subset(validation.sort().values) if held_out else source.validation,
    )


def _first(samples: Samples, count: int, generator: torch.Generator) -> Samples:
    order = stratified_order(samples.targets, generator)[:count]
    return samples.subset(order.sort().values)
