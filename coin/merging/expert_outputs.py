"""The outputs of the experts to which a body's units are fitted, made group by group of units."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from coin.core.batches import take
from coin.errors import DataError, StateError
from coin.merging.rows import Rows
from coin.merging.units import SAME_CALLS, Trace, Unit, floating_parameters, output_rows
from coin.networks.calling import as_input, logits_of
from coin.networks.guard import evaluating
from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call
from coin.statistics.sums import sum_type


def sample_weights(row: Sequence[float], tasks: Tensor) -> Tensor:
    """Return what samples of these tasks [P] weigh: those of task i together β_i.

    Raises DataError where a task that has a share in the row has no samples.
    """
    beta = torch.tensor(row, dtype=torch.float64)
    counts = torch.bincount(tasks, minlength=len(row))
    is_missing = (beta > 0) & (counts == 0)
    missing = is_missing.nonzero().flatten().tolist()
    if missing:
        raise DataError(
            f"found no calibration samples of task {missing[0]}, which has a share in the code row {list(row)}, "
            "expected at least one; give some, or raise memory_mib"
        )
    return (beta / counts)[tasks]


def grouped(units: Iterable[Unit], rows: Rows, budget: float) -> list[list[Unit]]:
    """Return units in groups whose targets take at most `budget` bytes together; a group has one unit at least."""
    samples = len(rows.tasks)
    groups: list[list[Unit]] = []
    used = 0
    for unit in units:
        places = rows.places[unit.weight]
        positions = unit.positions if places is None else places.shape[1]
        size = 4 * samples * positions * unit.channels  # in float32
        if not groups or used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(unit)
        used += size
    return groups


class ExpertOutputs:
    """The experts' outputs to which the units of a trace are fitted, made in the units' order.

    For each group of units (`grouped`) every expert runs on its own task's samples, `batch_size` at once, if they weigh
    anything.

    Attributes:
        passes: The samples that pass through experts, in all.
    """

    def __init__(
        self,
        experts: Callable[[], Iterable[nn.Module]],
        trace: Trace,
        rows: Rows,
        batch_size: int,
        budget: float,
    ) -> None:
        self._experts = experts
        self._calls = trace.calls
        self._rows = rows
        self._batch_size = batch_size
        self._groups = grouped(trace.units, rows, budget)
        self._made: dict[str, Tensor] = {}
        self.passes = len(self._groups) * int(rows.shares.count_nonzero())

    def each_unit(self, advance: Callable[[int], None]) -> Iterator[Tensor]:
        """Yield every unit's targets [P, q, ·], in the order of `output_rows`; `advance` gets the samples that passed.

        Raises StateError where an expert makes other calls than the traced network, or gives outputs of another shape.
        """
        for group in self._groups:
            ends = {unit.end: unit for unit in group}
            for expert, network in enumerate(self._experts()):
                is_read = (self._rows.tasks == expert) & (self._rows.shares > 0)
                samples = is_read.nonzero().flatten()
                for part in torch.split(samples, self._batch_size):
                    if len(part) > 0:
                        self._add(network, ends, part)
                        advance(len(part))
            for unit in group:
                yield self._made.pop(unit.weight)

    def _add(self, network: nn.Module, ends: Mapping[str, Unit], part: Tensor) -> None:
        """Run an expert on the samples `part` [p], and add their targets of the units."""
        calls: list[str] = []

        def visit(
            call: Call, names: dict[str, str], function: Callable[[], Tensor]
        ) -> Tensor | None:
            weight = names.get("weight", "")
            if weight not in self._calls:
                return None
            calls.append(weight)
            output = function()
            if weight in ends:
                self._add_rows(ends[weight], call, output, part)
            return output

        with evaluating(network, gradients=False), Interceptor(floating_parameters(network), visit):
            inputs = take(self._rows.inputs, part)
            logits_of(network, as_input(inputs, network))
        if calls != self._calls:
            raise StateError(
                f"an expert calls other layers than the coded network, or in another order; {SAME_CALLS}"
            )

    def _add_rows(self, unit: Unit, call: Call, output: Tensor, part: Tensor) -> None:
        """Add one unit's targets, given the output of its last call on the samples `part`."""
        check_rows(unit, len(output), len(part))
        if output.shape[1:] != unit.shape[1:]:
            raise StateError(
                f"'{unit.end}' gives {[*output.shape[1:]]} in an expert and {[*unit.shape[1:]]} in the coded network; "
                f"{SAME_CALLS}"
            )
        places = self._rows.places[unit.weight]
        if places is not None:
            places = places[part.to(places.device)]
        flat = output_rows(call, output, len(part), places)  # [p·q, O]
        in_sums = flat.to(sum_type(flat))
        rows = in_sums.view(len(part), -1, flat.shape[1])  # [p, q, O]
        if unit.weight not in self._made:
            self._made[unit.weight] = rows.new_zeros(len(self._rows.tasks), *rows.shape[1:])
        self._made[unit.weight].index_copy_(0, part.to(rows.device), rows)


def check_rows(unit: Unit, rows: int, samples: int) -> None:
    """Raise StateError where a call of a unit is not on all samples at once, as of a network that runs in chunks."""
    expected = samples * unit.shape[0]
    if rows != expected:
        raise StateError(
            f"'{unit.weight}' is called on {rows} rows for {samples} samples, expected {expected}; give networks that "
            "make the same calls and run a batch at once, not in chunks"
        )
