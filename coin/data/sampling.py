"""Random choices: the streams of a seed, and orders of which every prefix holds the classes in proportion."""

from enum import IntEnum

import numpy as np
import pandas as pd
import torch
from torch import Tensor


class Stream(IntEnum):
    """The uses of a seed, each with random numbers of its own."""

    TRAIN_SPLIT = 0
    TEST_SPLIT = 1
    ORDER = 2
    AUGMENTATION = 3
    CALIBRATION = 4
    RENDER_TRAIN = 5
    RENDER_TEST = 6
    PROMISE = 9


def make_generator(seed: int, *keys: int) -> torch.Generator:
    """A CPU generator that depends on ``(seed, *keys)`` alone."""
    state = np.random.SeedSequence(seed, spawn_key=keys).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A shuffle of ``range(P)``, int64 [P], of which every prefix holds the classes in proportion, or nearly."""
    shuffled = torch.randperm(len(labels), generator=generator)
    classes = pd.Series(labels[shuffled].numpy())
    by_class = classes.groupby(classes)
    progress = (by_class.cumcount() + 0.5) / by_class.transform(
        "size"
    )  # through the class, in (0, 1)
    return shuffled[progress.to_numpy().argsort(kind="stable")]
