"""The search for a training's learning rate and number of steps, by the loss on held-out samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

POINTS = 10  # validations of a run with a constant learning rate: the numbers of steps to choose from
TRIALS = 12  # the most trials of one search


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    losses: dict[tuple[float, int], float]  # held out, of all pairs (learning rate, number of steps) that were tried
    at_edge: bool  # whether the best of them is at the edge of what was tried

    @property
    def best(self) -> tuple[float, int]:
        """The pair with the smallest loss."""
        return min(self.losses, key=lambda pair: self.losses[pair])

    @property
    def config_dict(self) -> dict[str, Any]:
        """The entry in a coded model's metadata."""
        lr, steps = self.best
        losses = {f"{rate:.3g} × {count}": loss for (rate, count), loss in self.losses.items()}
        return {"at_edge": self.at_edge, "lr": lr, "steps": steps, "held_out_loss": losses}


def search_grid(loss: Callable[[float, int], float], rates: Sequence[float], steps: int) -> SearchResult:
    """Descend on a grid of learning rates and numbers of steps, until all four neighbours are worse.

    It starts with `steps` and the middle one of the ascending rates, and extends beyond these by their ratio (√10 for a
    single rate) and by powers of two; so the result is at the edge only if the trials run out. The held-out loss of a
    pair is infinite where a run diverges.
    """
    ratio = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1)) if len(rates) > 1 else math.sqrt(10)
    tried: dict[tuple[int, int], float] = {}

    def pair(place: tuple[int, int]) -> tuple[float, int]:
        index, power = place
        rate = rates[index] if 0 <= index < len(rates) else rates[0] * ratio**index
        return rate, max(1, round(steps * 2.0**power))

    def neighbours(place: tuple[int, int]) -> list[tuple[int, int]]:
        index, power = place
        around = [(index - 1, power), (index + 1, power), (index, power - 1), (index, power + 1)]
        return [each for each in around if pair(each) != pair(place)]

    best = (len(rates) // 2, 0)
    tried[best] = loss(*pair(best))
    while missing := [each for each in neighbours(best) if each not in tried]:
        if len(tried) == TRIALS:
            break
        tried[missing[0]] = loss(*pair(missing[0]))
        best = min(tried, key=lambda each: tried[each])
    return SearchResult({pair(place): value for place, value in tried.items()}, at_edge=bool(missing))


def search_curves(losses: Callable[[float, int], Sequence[float]], rates: Sequence[float], steps: int) -> SearchResult:
    """Try the given learning rates, ascending, each with about ten numbers of steps along one run at a constant rate.

    `losses` returns a run's held-out losses, given the rate and the number of steps between validations.
    """
    every = max(1, steps // POINTS)
    runs = ((rate, (point + 1) * every, loss) for rate in rates for point, loss in enumerate(losses(rate, every)))
    tried = {(rate, count): loss for rate, count, loss in runs if math.isfinite(loss)}
    best, _ = min(tried, key=lambda pair: tried[pair], default=(rates[0], steps))
    return SearchResult(tried, at_edge=best in (rates[0], rates[-1]))
