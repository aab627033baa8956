"""Layer rules: squared per-sample gradients of a layer's parameters from its input and its output's cotangents."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Totals = Mapping[str, Tensor]
"""Role ("weight", "bias") → accumulator of Σ_n Σ_v (Uᵥ · ∂f/∂θ)², written in place; that of a frozen θ is absent."""


@dataclass(eq=False)
class Call(ABC):
    """One call of a function that has a layer rule, on B samples.

    V cotangents of the output arrive as g [V, N, …], in the totals' type and possibly in several chunks of V; a rule
    adds what it can at once and the rest in `finish`. N is B·k, with the k rows of a sample lying together.

    Attributes:
        inputs: What the weight multiplies or is added to [N, …], with its history until a `Tape` takes that.
        weight: The trainable parameter, or another tensor.
        bias: The same, where the call has one.
        reads_input: Whether the backward pass needs the input's values.
        names: Role → the trainable parameter's name; set by an `Interceptor`.
        decided: Whether activations had placed rows before it, which they may do differently in another network; set
            by a `Tape`, as is what follows.
        made: The output's shape.
        source: The id of the node in autograd's graph whose output the input is.
        node: The id of this call's own node there.
        readers: How many functions read the output.
    """

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None

    def __post_init__(self) -> None:
        self.reads_input = self.weight.requires_grad
        self.decided = False
        self.names: dict[str, str] = {}
        self.made = torch.Size()
        self.source = 0
        self.node = 0
        self.readers = 0

    @abstractmethod
    def accumulate(self, g: Tensor, samples: int, totals: Totals) -> None:
        """Add the squares that the cotangents g [V, N, …] of the output bring."""

    @abstractmethod
    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        """Return the cotangents of the input [V, N, …], as if the weight were the given one."""

    def output(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Return what the call makes of some rows of its inputs with another value of its weight."""
        # No unit of it is fitted.
        raise NotImplementedError(f"{type(self).__name__} gives no output")

    def along(self, values: Tensor, output: Tensor) -> Tensor:
        """Return values [O], one for each of the call's outputs, as they broadcast over its output [N, …]."""
        return values.flatten()

    def finish(self, totals: Totals) -> None:  # noqa: B027 (most rules defer nothing)
        """Add what was deferred until all cotangents had been seen."""
