"""The outputs of the experts to which a body's units are fitted, made for a group of units at a time."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from coin.core.batches import take
from coin.errors import StateError
from coin.merging.experts import Experts
from coin.merging.regression import output_rows
from coin.merging.rows import Rows
from coin.merging.units import SAME_CALLS, Unit, run_visited
from coin.statistics.rules import Call
from coin.statistics.sums import sum_type


def grouped(units: Iterable[Unit], rows: Rows, budget: float) -> list[list[Unit]]:
    """Return units in groups whose targets take at most `budget` bytes together; a group has one unit at least."""
    groups: list[list[Unit]] = []
    used = 0
    for unit in units:
        nbytes = rows.nbytes_of_targets(unit)
        if not groups or used + nbytes > budget:
            groups.append([])
            used = 0
        groups[-1].append(unit)
        used += nbytes
    return groups


class ExpertOutputs:
    """The experts' outputs z to which units are fitted: each expert's own on its own task's samples.

    When a unit's are asked for, every expert that weighs anything runs once, and leaves those of the unit's group.

    Args:
        experts: The experts.
        calls: The weights of all calls of a forward pass, in their order.
        rows: The samples and their positions.
        groups: The units, as many together as memory bears.
        advance: Is called with the number of samples that have passed.

    Attributes:
        units: The units by their weights.
    """

    def __init__(
        self,
        experts: Experts,
        calls: Sequence[str],
        rows: Rows,
        groups: Sequence[Sequence[Unit]],
        advance: Callable[[int], object],
    ) -> None:
        self._experts = experts
        self._calls = calls
        self._rows = rows
        self._groups = groups
        self._advance = advance
        self._made: dict[str, Tensor] = {}
        self.units = {unit.weight: unit for group in groups for unit in group}

    def take(self, unit: Unit) -> Tensor:
        """Return a unit's targets [P, q, G·O], in the order of `output_rows`, and forget them.

        Raises StateError where an expert makes the body's calls in another order or number, or not on all samples at
        once.
        """
        if unit.weight not in self._made:
            (group,) = [group for group in self._groups if unit in group]
            for expert, network in enumerate(self._experts.source.each_network()):
                is_read = (self._rows.tasks == expert) & (self._rows.shares > 0)
                samples = is_read.nonzero().flatten()
                size = self._experts.pooled.batch_size
                for first in range(0, len(samples), size):
                    part = samples[first : first + size]
                    self._run(network, group, part)
                    self._advance(len(part))
        return self._made.pop(unit.weight)

    def _run(self, network: nn.Module, group: Sequence[Unit], part: Tensor) -> None:
        """Run an expert on the samples `part` [p], and keep its outputs of some units."""
        ends = {unit.end: unit for unit in group}
        calls: list[str] = []

        def visit(
            call: Call, names: dict[str, str], function: Callable[[], Tensor]
        ) -> Tensor | None:
            weight = names.get("weight", "")
            # With gradients the body's pass has not seen calls of a computed bias.
            if weight not in self._calls:
                return None
            calls.append(weight)
            output = function()
            if weight in ends:
                self._keep(ends[weight], call, output, part)
            return output

        run_visited(network, take(self._rows.inputs, part), visit)
        if calls != self._calls:
            raise StateError(
                f"an expert calls other layers than the coded network, or in another order; {SAME_CALLS}"
            )

    def _keep(self, unit: Unit, call: Call, output: Tensor, part: Tensor) -> None:
        """Keep a unit's outputs at its rows, given those of its last call on the samples `part`."""
        check_rows(unit, len(output), len(part))
        places = self._rows.places[unit.weight]
        if places is not None:
            places = places[part.to(places.device)]
        flat = output_rows(call, output, len(part), places)  # [p·q, G·O]
        targets = flat.to(sum_type(flat)).view(len(part), -1, unit.channels)
        if unit.weight not in self._made:
            self._made[unit.weight] = targets.new_zeros(len(self._rows.tasks), *targets.shape[1:])
        self._made[unit.weight].index_copy_(0, part.to(targets.device), targets)


def check_rows(unit: Unit, rows: int, samples: int) -> None:
    """Raise StateError where a call of a unit is not on all samples at once, as of a network that runs in chunks."""
    expected = samples * unit.shape[0]
    if rows != expected:
        raise StateError(
            f"'{unit.weight}' is called on {rows} rows for {samples} samples, expected {expected}; give networks that "
            "make the same calls and run a batch at once, not in chunks"
        )
