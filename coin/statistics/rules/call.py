"""One call of a ruled function: what every layer rule offers to the pass that drives it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Site:
    """Where a call stands in its pass.

    Attributes:
        samples: B, the number of samples; the input's leading dimension is B or a multiple of it (B·k, the k rows of
            a sample lying together, as with the windows of a windowed attention).
        names: Role ("weight", "bias") → name of the trainable parameter that plays it; frozen ones are absent.
        totals: Parameter name → accumulator of Σ_n Σ_v (Uᵥ · ∂f/∂θ)², written in place.
    """

    samples: int
    names: Mapping[str, str]
    totals: Mapping[str, Tensor]

    def total(self, role: str) -> Tensor | None:
        """Return the accumulator of the parameter in a role, None if it is frozen or absent."""
        name = self.names.get(role)
        return None if name is None else self.totals[name]


class Call(ABC):
    """One call of a function that has a layer rule.

    V cotangents of the call's output arrive as g [V, N, …] with N the output's leading dimension, possibly in several
    chunks of V; a rule adds what it can at once and the rest in `finish`.

    Attributes:
        inputs: The input [N, …], as the function saw it.
        weight: The tensor that the function takes in the role of the weight.
        reads_input: Whether the backward pass needs the input's values, so that they must not be changed meanwhile.
    """

    inputs: Tensor
    weight: Tensor
    reads_input = True

    @abstractmethod
    def accumulate(self, g: Tensor, site: Site) -> None:
        """Add the squares that the cotangents g [V, N, …] of the output bring, which are of the totals' type."""

    @abstractmethod
    def input_gradient(self, g: Tensor) -> Tensor:
        """Return the cotangents of the input [V, N, …]."""

    def finish(self, site: Site) -> None:  # noqa: B027 (most rules defer nothing)
        """Add what was deferred until all cotangents had been seen."""


def squared_sums(g: Tensor, samples: int, keep: int) -> Tensor:
    """Return Σ_v Σ_n (Σ_positions g)² for g [V, B·k, …] with the trailing (or channel) dimension `keep`, [size]."""
    positions = [d for d in range(2, g.ndim) if d != keep % g.ndim]
    sums = g.sum(positions) if positions else g
    if g.shape[1] != samples:
        sums = sums.reshape(len(g), samples, -1, g.shape[keep]).sum(2)
    return torch.square(sums).sum((0, 1))
