"""Which test images an evaluation keeps to be looked at: a fixed choice that no result has a say in."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from coin.data import to_image

DIFFERING, AGREEING = 48, 8
"""How many images are kept of a task: where expert and decoder answer differently, and where they agree."""
SIDE = 96
"""The largest side of a kept image in pixels."""


@dataclass(frozen=True)
class KeptSamples:
    """Test samples of one task; those with differing answers come first.

    Attributes:
        images: uint8 ``[n, 3, H, W]``.
        position: Their places in the test set ``[n]``.
        expert: The classes that the expert answers ``[n]``.
        decoded: The classes that were decoded ``[n]``.
        label: Their true classes ``[n]``.
    """

    images: Tensor
    position: Tensor
    expert: Tensor
    decoded: Tensor
    label: Tensor


class ExampleSamples(Metric):
    """Keeps the first few samples of a test set in a fixed random order: some whose answers differ, some that agree.

    The same samples are kept whatever the batches and the processes, which each see a share of the test set.

    Args:
        samples: The size of the test set.
        image_size: The side of the inputs in pixels.
        differing: How many samples with differing answers to keep at most.
        agreeing: How many with the same answer.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    # One row per sample that is kept, those with differing answers first; a place of `samples` marks an empty row.
    places: Tensor
    answers: Tensor
    images: Tensor

    def __init__(self, samples: int, image_size: int, differing: int = DIFFERING, agreeing: int = AGREEING) -> None:
        super().__init__()
        self.samples, self.side = samples, min(image_size, SIDE)
        self.parts = (slice(0, differing), slice(differing, differing + agreeing))
        self.order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
        self.place_of = self.order.argsort()
        rows = differing + agreeing
        # Processes' rows are put one after the other.
        self.add_state("places", torch.full((rows,), samples), dist_reduce_fx=_stacked)
        self.add_state("answers", torch.zeros(rows, 3, dtype=torch.int64), dist_reduce_fx=_stacked)
        self.add_state("images", torch.zeros(rows, 3, self.side, self.side, dtype=torch.uint8), dist_reduce_fx=_stacked)

    def update(self, inputs: Tensor, positions: Tensor, expert: Tensor, decoded: Tensor, labels: Tensor) -> None:
        """Look at a batch.

        Args:
            inputs: What the networks read ``[B, 3, S, S]``.
            positions: The samples' places in the test set ``[B]``.
            expert: The classes that the expert answers ``[B]``.
            decoded: The classes that were decoded ``[B]``.
            labels: The true classes ``[B]``.
        """
        places = self.place_of[positions.cpu()].to(self.places.device)
        answers = torch.stack([expert, decoded, labels], 1).to(self.answers)
        for part, like in zip(self.parts, (False, True), strict=True):
            count = part.stop - part.start
            found = torch.nonzero((expert == decoded) == like).flatten().to(places.device)
            found = found[places[found].argsort()[:count]]
            if len(found) == 0:
                continue
            joined = torch.cat([self.places[part], places[found]])
            chosen = joined.argsort()[:count]
            images = to_image(inputs[found.to(inputs.device)], self.side).to(self.images.device)
            self.answers[part] = torch.cat([self.answers[part], answers[found]])[chosen]
            self.images[part] = torch.cat([self.images[part], images])[chosen]
            self.places[part] = joined[chosen]

    def compute(self) -> dict[str, Tensor]:
        """Return the places, answers and images of what was kept of all processes' shares."""
        rows = self.parts[1].stop
        origin = torch.arange(len(self.places), device=self.places.device) % rows
        chosen = []
        for part in self.parts:
            own = torch.nonzero((origin >= part.start) & (origin < part.stop) & (self.places < self.samples)).flatten()
            chosen.append(own[self.places[own].argsort()[: part.stop - part.start]])
        kept = torch.cat(chosen)
        return {"places": self.places[kept], "answers": self.answers[kept], "images": self.images[kept]}

    def kept(self) -> KeptSamples:
        """Return what was kept of all processes' shares."""
        # torchmetrics makes scalars of results with a single number.
        found = {name: value.cpu() for name, value in self.compute().items()}
        expert, decoded, label = found["answers"].reshape(-1, 3).unbind(1)
        position = self.order[found["places"].reshape(-1)]
        return KeptSamples(found["images"].reshape(-1, 3, self.side, self.side), position, expert, decoded, label)


def _stacked(states: Tensor) -> Tensor:
    """Return the states of all processes ``[processes, rows, ...]`` as one ``[processes · rows, ...]``."""
    return states.flatten(0, 1)
