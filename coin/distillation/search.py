"""The search for a training's learning rate and number of steps, by the loss on held-out samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

TRIALS = 12  # the most trials of one search


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    # Held out, of all pairs (learning rate, number of steps) that were tried.
    losses: dict[tuple[float, int], float]
    at_edge: bool  # whether the trials ran out before all neighbours of the best pair were tried

    @property
    def best(self) -> tuple[float, int]:
        """The pair with the smallest loss."""
        return min(self.losses, key=lambda pair: self.losses[pair])

    @property
    def config_dict(self) -> dict[str, Any]:
        """The entry in a coded model's metadata."""
        lr, steps = self.best
        losses = {}
        for (rate, count), loss in self.losses.items():
            losses[f"{rate:.3g} × {count}"] = loss
        return {"at_edge": self.at_edge, "lr": lr, "steps": steps, "held_out_loss": losses}


def search_grid(
    loss: Callable[[float, int], float], rates: Sequence[float], steps: int
) -> SearchResult:
    """Descend on a grid of learning rates and numbers of steps, until all four neighbours are worse.

    It starts with `steps` and the middle one of the ascending rates. The grid goes on beyond the given rates by their
    ratio (√10 for a single rate), and beyond `steps` by powers of two. `loss` is infinite where a run diverges.
    """
    ratio = math.sqrt(10)
    if len(rates) > 1:
        ratio = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))

    def pair(place: tuple[int, int]) -> tuple[float, int]:
        index, power = place
        is_given = 0 <= index < len(rates)
        rate = rates[index] if is_given else rates[0] * ratio**index
        return rate, max(1, round(steps * 2.0**power))

    def neighbours(place: tuple[int, int]) -> list[tuple[int, int]]:
        index, power = place
        around = [
            (index - 1, power),
            (index + 1, power),
            (index, power - 1),
            (index, power + 1),
        ]
        return [each for each in around if pair(each) != pair(place)]

    best = (len(rates) // 2, 0)
    tried = {best: loss(*pair(best))}
    while True:
        missing = [each for each in neighbours(best) if each not in tried]
        if not missing or len(tried) == TRIALS:
            break
        rate, count = pair(missing[0])
        tried[missing[0]] = loss(rate, count)
        best = min(tried, key=lambda each: tried[each])
    losses = {pair(place): value for place, value in tried.items()}
    return SearchResult(losses, at_edge=bool(missing))
