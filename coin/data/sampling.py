"""Random choices: the streams of a seed, and orders of which every prefix holds the classes in proportion."""

from enum import IntEnum

import numpy as np
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
    by_class = torch.argsort(labels[shuffled], stable=True)
    sorted_labels = labels[shuffled][by_class]
    counts = torch.bincount(labels)
    first = torch.cumsum(counts, 0) - counts  # where each class begins in `sorted_labels`
    rank = torch.arange(len(labels)) - first[sorted_labels]  # within the class
    progress = torch.empty(len(labels), dtype=torch.float64)  # through the class, in (0, 1)
    progress[by_class] = (rank.double() + 0.5) / counts[sorted_labels]
    return shuffled[torch.argsort(progress, stable=True)]
