"""The engine: squared per-sample gradients summed over samples, by layer rules where they hold."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from coin.errors import DataError
from coin.statistics.per_sample import add_per_sample_squares
from coin.statistics.probe import rows_per_sample
from coin.statistics.tape import Tape


class SquaredGradients:
    """Adds up Σ_n Σ_v (Uᵥₙ · ∂f(x_n)/∂θ)² over the batches it is given.

    Args:
        network: In eval mode, with gradients enabled (see `coin.statistics.guard.evaluating`).
        parameters: Name → parameter, those to differentiate by.
        memory_mib: Bound on the working memory, in MiB.
    """

    def __init__(self, network: nn.Module, parameters: Mapping[str, Tensor], memory_mib: int) -> None:
        self._network, self._parameters, self._memory_mib = network, parameters, memory_mib
        self._totals = {name: _accumulator(parameter) for name, parameter in parameters.items()}
        self._rows: dict[tuple[int, ...], dict[str, int]] = {}

    def totals(self) -> dict[str, Tensor]:
        """Return the sums so far, each of its parameter's shape."""
        return {name: total.contiguous() for name, total in self._totals.items()}

    def add(self, inputs: Tensor, cotangents: Callable[[Tensor, int], Tensor]) -> Iterator[tuple[int, int]]:
        """Add a batch, cut to fit the memory.

        Args:
            inputs: [B, …].
            cotangents: (logits [b, C] of the samples from `start` on, start) → U [V, b, C].

        Yields:
            (samples, V) of every cut.

        Raises:
            DataError: The network's output is not [B, C].
        """
        size = len(inputs)
        for start in range(0, len(inputs), max(1, size)):
            piece = inputs[start : start + size]
            yield len(piece), self._add(piece, lambda logits, start=start: cotangents(logits, start))  # type: ignore[misc]

    def _add(self, inputs: Tensor, cotangents: Callable[[Tensor], Tensor]) -> int:
        shape = tuple(inputs.shape[1:])
        if shape not in self._rows:
            self._rows[shape] = rows_per_sample(self._network, inputs[:1], self._parameters)
        like = next(iter(self._parameters.values()))
        tape = Tape(len(inputs), self._rows[shape], self._totals, like)
        output = tape.run(self._network, inputs, self._parameters)
        if output.ndim != 2 or len(output) != len(inputs):
            raise DataError(f"the network's output is {list(output.shape)}, expected logits [{len(inputs)}, C]")
        general = tape.close(output, self._parameters)
        rows = cotangents(output.detach())
        tape.backward(output, rows, last=True)
        tape.finish()
        if general:
            chosen = {name: self._parameters[name] for name in self._parameters if name in general}
            add_per_sample_squares(self._network, inputs, rows, chosen, self._totals)
        return len(rows)


def _accumulator(parameter: Tensor) -> Tensor:
    """Return zeros of a parameter's shape; kernels with the channels last in memory, as the convolution rule writes."""
    if parameter.ndim < 3:
        return torch.zeros_like(parameter, memory_format=torch.contiguous_format, requires_grad=False)
    shape = (parameter.shape[0], *parameter.shape[2:], parameter.shape[1])
    return parameter.new_zeros(shape).movedim(-1, 1)
