"""The test images shown in reports: a fixed random draw, independent of the results."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from coin.data import to_image

SIDE = 96  # of an image at most, in pixels


class KeptSamples(NamedTuple):
    """Test samples of one task in a random order."""

    images: Tensor  # uint8 [n, 3, H, W]
    position: Tensor  # in the test set, [n]
    expert: Tensor  # the expert's classes, [n]
    label: Tensor  # the true classes, [n]
    decoded: Tensor  # the classes decoded in K ways, [n, K]


class ExampleSamples(Metric):
    """Keeps the first `count` samples of a test set in a fixed random order, with the answers to them in K ways."""

    full_state_update = False
    answers: Tensor
    images: Tensor

    def __init__(self, samples: int, image_size: int, ways: int, count: int = 24) -> None:
        super().__init__()
        self.side = min(image_size, SIDE)
        self.order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
        self.row_of = self.order.argsort()
        rows = min(count, samples)
        # Each sample has a row of its own; a process that has not seen it holds what is less than any answer.
        self.add_state("answers", torch.full((rows, 2 + ways), -1), dist_reduce_fx="max")
        self.add_state("images", torch.zeros(rows, 3, self.side, self.side, dtype=torch.uint8), dist_reduce_fx="max")

    def update(self, inputs: Tensor, positions: Tensor, expert: Tensor, labels: Tensor, decoded: Tensor) -> None:
        """Add a batch: the networks' inputs ``[B, 3, S, S]``, `decoded` ``[B, K]``, all others ``[B]``."""
        rows = self.row_of[positions.cpu()]
        chosen = torch.nonzero(rows < len(self.answers)).flatten()
        if len(chosen):
            rows, answers = rows[chosen].to(self.answers.device), torch.column_stack([expert, labels, decoded])
            self.answers[rows] = answers[chosen.to(answers.device)].to(self.answers)
            self.images[rows] = to_image(inputs[chosen.to(inputs.device)], self.side).to(self.images)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the states over all processes; see `kept`."""
        return self.answers, self.images

    def kept(self) -> KeptSamples:
        """Return the samples seen and kept over all processes, in the CPU's memory."""
        answers, images = (state.cpu() for state in self.compute())  # where torchmetrics makes one number a scalar
        seen = answers[:, 0] >= 0  # all of them, unless test batches are limited
        answers, position = answers[seen], self.order[: len(seen)][seen]
        return KeptSamples(images[seen], position, answers[:, 0], answers[:, 1], answers[:, 2:])
