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

    The images are uint8 ``[n, 3, H, W]``, all others ``[n]``: their places in the test set, and the classes that the
    expert answers, that were decoded, and that are true.
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
    # One row per sample that is kept; a place of `samples` marks an empty row.
    places: Tensor
    answers: Tensor
    images: Tensor

    def __init__(self, samples: int, image_size: int, differing: int = DIFFERING, agreeing: int = AGREEING) -> None:
        super().__init__()
        self.samples, self.side = samples, min(image_size, SIDE)
        self.most = (differing, agreeing)
        self.order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
        self.place_of = self.order.argsort()
        rows = differing + agreeing
        # Processes' rows are put one after the other.
        self.add_state("places", torch.full((rows,), samples), dist_reduce_fx=_stacked)
        self.add_state("answers", torch.zeros(rows, 3, dtype=torch.int64), dist_reduce_fx=_stacked)
        self.add_state("images", torch.zeros(rows, 3, self.side, self.side, dtype=torch.uint8), dist_reduce_fx=_stacked)

    def update(self, inputs: Tensor, positions: Tensor, expert: Tensor, decoded: Tensor, labels: Tensor) -> None:
        """Look at a batch: what networks read ``[B, 3, S, S]``, and of the others ``[B]`` each; see `KeptSamples`."""
        rows = len(self.places)
        places = torch.cat([self.places, self.place_of[positions.cpu()].to(self.places)])
        answers = torch.cat([self.answers, torch.stack([expert, decoded, labels], 1).to(self.answers)])
        chosen = self._chosen(places, answers)
        old, new = chosen[chosen < rows], chosen[chosen >= rows]
        if len(new) == 0:
            return
        images = to_image(inputs[(new - rows).to(inputs.device)], self.side).to(self.images)
        kept, chosen = slice(0, len(chosen)), torch.cat([old, new])
        self.images[kept] = torch.cat([self.images[old], images])
        self.places[kept], self.answers[kept] = places[chosen], answers[chosen]

    def compute(self) -> dict[str, Tensor]:
        """Return the places, answers and images of what was kept of all processes' shares."""
        chosen = self._chosen(self.places, self.answers)
        return {"places": self.places[chosen], "answers": self.answers[chosen], "images": self.images[chosen]}

    def kept(self) -> KeptSamples:
        """Return what was kept of all processes' shares."""
        # torchmetrics makes scalars of results with a single number.
        found = {name: value.cpu() for name, value in self.compute().items()}
        expert, decoded, label = found["answers"].reshape(-1, 3).unbind(1)
        position = self.order[found["places"].reshape(-1)]
        return KeptSamples(found["images"].reshape(-1, 3, self.side, self.side), position, expert, decoded, label)

    def _chosen(self, places: Tensor, answers: Tensor) -> Tensor:
        """Return the rows to keep: the first that differ, then the first that agree."""
        differing = answers[:, 0] != answers[:, 1]
        chosen = []
        for kind, most in zip((differing, ~differing), self.most, strict=True):
            rows = torch.nonzero(kind & (places < self.samples)).flatten()
            chosen.append(rows[places[rows].argsort()[:most]])
        return torch.cat(chosen)


def _stacked(states: Tensor) -> Tensor:
    """Return the states of all processes ``[processes, rows, ...]`` as one ``[processes · rows, ...]``."""
    return states.flatten(0, 1)
