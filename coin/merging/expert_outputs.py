"""The experts' passes of a refit: they leave their outputs at some positions, of as many layers as memory allows."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from coin.core.batches import Batch, as_input, take
from coin.errors import StateError
from coin.merging.affine import output_rows
from coin.merging.units import Trace, Unit, floating_parameters
from coin.statistics.guard import evaluating
from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call
from coin.statistics.sums import sum_type

_SAME = "give experts that make the same calls whatever their inputs"


def outputs_budget(memory_mib: int) -> int:
    """Return how many bytes of experts' outputs a refit holds at once; with fewer than 64 MiB experts run too often."""
    return max(memory_mib // 4, 64) << 20


class Rows(NamedTuple):
    """What units are fitted to on P samples; `places` and `weights` are by the names of the units' weights."""

    inputs: Batch
    mixtures: Tensor  # every sample's mixture of the experts' outputs [N, P]
    shares: Tensor  # what the samples weigh [P]
    places: Mapping[str, Tensor | None]  # of `chosen_places`
    weights: Mapping[str, Tensor]  # of `position_weights`


class ExpertOutputs:
    """The mixtures of the experts' outputs to which the units of a trace are fitted, made on demand in their order.

    As many units at once as fit into `budget` bytes, one at least; for every such group each expert, of those that
    `experts` returns, runs on the samples of whose mixtures it is part, `batch_size` at once. `passes` counts the
    samples that have gone through experts, of `total`; `advance` is called with their number after every batch.
    """

    def __init__(
        self, experts: Callable[[], Iterable[nn.Module]], trace: Trace, rows: Rows, batch_size: int, budget: float
    ) -> None:
        self._experts, self._trace, self._rows, self._batch_size = experts, trace, rows, batch_size
        self._made: dict[str, Tensor] = {}
        self._groups: list[list[Unit]] = []
        samples, left = rows.mixtures.shape[1], -1.0
        for unit in trace.units:
            at = rows.places[unit.weight]
            size = target_bytes(unit, samples, unit.positions if at is None else at.shape[1])
            if left < size:
                self._groups.append([])
                left = budget
            self._groups[-1].append(unit)
            left -= size
        self.passes, self.total = 0, len(self._groups) * int(rows.mixtures.count_nonzero())
        self.advance: Callable[[float], None] = lambda _: None

    def pop(self, weight: str) -> Tensor:
        """Return a unit's targets [P, q, ·], in the order of `output_rows`, and keep them no longer.

        Raises StateError where an expert makes other calls than the traced network, or gives outputs of another shape.
        """
        while weight not in self._made:
            ends = {unit.end: unit for unit in self._groups.pop(0)}
            for network, mixture in zip(self._experts(), self._rows.mixtures, strict=True):
                for part in filter(len, mixture.nonzero().flatten().split(self._batch_size)):
                    self._add(network, ends, part, mixture)
                    self.passes += len(part)
                    self.advance(len(part))
        return self._made.pop(weight)

    def _add(self, network: nn.Module, ends: Mapping[str, Unit], part: Tensor, mixture: Tensor) -> None:
        """Run an expert on the samples `part` [p], and add its share of some units' targets, of the mixtures [P]."""
        made: list[str] = []
        known = set(self._trace.calls)

        def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> Tensor | None:
            if (weight := names.get("weight")) not in known:
                return None
            made.append(weight)
            _check_calls(made, self._trace.calls)
            output = function()
            if unit := ends.get(weight):
                shape = (len(output) // len(part), *output.shape[1:])
                if shape != unit.shape:
                    found = f"'{weight}' gives {[*shape]} a sample in an expert and {[*unit.shape]}"
                    raise StateError(f"{found} in the coded network; {_SAME}")
                at = self._rows.places[unit.weight]
                rows = output_rows(call, output, len(part), None if at is None else at[part.to(at.device)])
                rows = rows.to(sum_type(rows)).view(len(part), -1, rows.shape[1])
                if unit.weight not in self._made:
                    self._made[unit.weight] = rows.new_zeros(len(mixture), *rows.shape[1:])
                share = mixture[part].to(rows)
                self._made[unit.weight].index_add_(0, part.to(rows.device), rows * share[:, None, None])
            return output

        with evaluating(network, gradients=False), Interceptor(floating_parameters(network), visit):
            network(as_input(take(self._rows.inputs, part), network))
        _check_calls([*made, ""], [*self._trace.calls, ""])


def target_bytes(unit: Unit, samples: int, places: int) -> int:
    """Return how many bytes a unit's targets take at so many places of every sample, in float32."""
    return 4 * samples * min(places, unit.positions) * (math.prod(unit.shape) // unit.positions)


def _check_calls(made: Sequence[str], expected: Sequence[str]) -> None:
    """Raise StateError where the last call is another than the coded network makes at its place."""
    there = expected[len(made) - 1] if len(made) <= len(expected) else ""
    if made[-1] != there:
        own, theirs = (f"calls '{weight}'" if weight else "is at its end" for weight in (made[-1], there))
        raise StateError(f"an expert {own} where the coded network {theirs}; {_SAME}")
