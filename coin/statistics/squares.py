"""The engine: squared per-sample gradients summed over samples, by layer rules where they hold."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from coin.errors import DataError
from coin.statistics.memory import Cut, choose_cut
from coin.statistics.per_sample import add_per_sample_squares
from coin.statistics.probe import Layout, probe
from coin.statistics.sums import sum_type
from coin.statistics.tape import Tape


class SquaredGradients:
    """Adds up Σ_n Σ_v (Uᵥₙ · ∂f(x_n)/∂θ)² over the batches it is given.

    Args:
        network: In eval mode, with gradients enabled (see `coin.statistics.guard.evaluating`).
        parameters: Name → parameter, those to differentiate by; at least one.
        memory_mib: Bound on the working memory, in MiB.
    """

    def __init__(self, network: nn.Module, parameters: Mapping[str, Tensor], memory_mib: int) -> None:
        self._network, self._parameters, self._memory_mib = network, parameters, memory_mib
        self._totals = {name: _accumulator(parameter) for name, parameter in parameters.items()}
        self._like = next(iter(parameters.values()))
        self._layouts: dict[tuple[int, ...], Layout] = {}

    def totals(self) -> dict[str, Tensor]:
        """Return the sums so far, each of its parameter's shape; in float32 where that has 16 bits."""
        return {name: total.contiguous() for name, total in self._totals.items()}

    def add(
        self, inputs: Tensor, number: Callable[[int], int], cotangents: Callable[[Tensor, int], Tensor]
    ) -> Iterator[tuple[int, int]]:
        """Add a batch, cut to fit the memory.

        Args:
            inputs: [B, …].
            number: C → V, the number of cotangents that will come for C classes.
            cotangents: (logits [b, C] of the samples from `start` on, start) → U [V, b, C].

        Yields:
            (samples, V) of every cut, when it is done.

        Raises:
            DataError: The network's output is not [B, C].
        """
        start = 0
        while start < len(inputs):
            layout = self._layout(inputs, 3)
            v = number(layout.classes)
            cut = choose_cut(layout, v, self._memory_mib, self._like)
            piece = inputs[start : start + cut.samples]
            self._add(piece, cut, lambda logits, start=start: cotangents(logits, start))  # type: ignore[misc]
            yield len(piece), v
            start += len(piece)

    def _layout(self, inputs: Tensor, copies: int) -> Layout:
        key = (*inputs.shape[1:], copies)
        if key not in self._layouts:
            self._layouts[key] = probe(self._network, inputs[:1], copies, self._parameters)
        return self._layouts[key]

    def _add(self, inputs: Tensor, cut: Cut, cotangents: Callable[[Tensor], Tensor]) -> None:
        layout = self._layout(inputs, 4 if len(inputs) == 3 else 3)
        tape = Tape(len(inputs), layout.rows, self._totals, self._like)
        output = tape.run(self._network, inputs, self._parameters)
        if output.ndim != 2 or len(output) != len(inputs):
            raise DataError(f"the network's output is {list(output.shape)}, expected logits [{len(inputs)}, C]")
        general = tape.close(output, self._parameters)
        rows = cotangents(output.detach())
        for start in range(0, len(rows), cut.cotangents):
            end = start + cut.cotangents
            tape.backward(output, rows[start:end], last=end >= len(rows))
        del output, tape
        if general:
            chosen = {name: parameter for name, parameter in self._parameters.items() if name in general}
            add_per_sample_squares(self._network, inputs, rows, chosen, self._totals)


def _accumulator(parameter: Tensor) -> Tensor:
    """Return zeros of a parameter's shape; kernels with the channels last in memory, as the convolution rule writes."""
    dtype = sum_type(parameter)
    if parameter.ndim < 3:
        return parameter.new_zeros(parameter.shape, dtype=dtype)
    shape = (parameter.shape[0], *parameter.shape[2:], parameter.shape[1])
    return parameter.new_zeros(shape, dtype=dtype).movedim(-1, 1)
