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


def objective(row: Sequence[float], task: Tensor, own_share: float) -> tuple[Tensor, Tensor]:
    """Return what the units are fitted to: every sample's mixture of the experts [N, P], and its weight [P].

    The objective is `own_share` times the sum over tasks, each with its own expert, and for the rest the β-average on
    all samples. A sum of squares with several targets is, up to a constant, one with the targets' weighted mean.
    Raises DataError where a task that has a share in the row has no samples.
    """
    beta = torch.tensor(row, dtype=torch.float64)
    counts = torch.bincount(task, minlength=len(row))
    is_missing = (beta > 0) & (counts == 0)
    missing = is_missing.nonzero().flatten().tolist()
    if own_share == 1 and missing:
        raise DataError(
            f"found no calibration samples of task {missing[0]}, which has a share in the code row {list(row)}, "
            "expected at least one; give some, raise memory_mib, or use target=both"
        )
    own = own_share * (beta / counts)[task]  # a task's samples weigh β_i together
    mixed = torch.full_like(own, (1 - own_share) / len(task))  # all samples weigh alike
    shares = own + mixed
    mixtures = torch.outer(beta, mixed)
    mixtures[task, torch.arange(len(task))] += own
    return mixtures / shares.where(shares > 0, 1), shares


def grouped(units: Iterable[Unit], rows: Rows, budget: float) -> list[list[Unit]]:
    """Return units in groups whose targets take at most `budget` bytes together; a group has one unit at least."""
    samples = rows.mixtures.shape[1]
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
    """The mixtures of the experts' outputs to which the units of a trace are fitted, made in the units' order.

    For each group of units (`grouped`) every expert runs on the samples of whose mixtures it is part, `batch_size` at
    once.

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
        self.passes = len(self._groups) * int(rows.mixtures.count_nonzero())

    def each_unit(self, advance: Callable[[int], None]) -> Iterator[Tensor]:
        """Yield every unit's targets [P, q, ·], in the order of `output_rows`; `advance` gets the samples that passed.

        Raises StateError where an expert makes other calls than the traced network, or gives outputs of another shape.
        """
        for group in self._groups:
            ends = {unit.end: unit for unit in group}
            for network, mixture in zip(self._experts(), self._rows.mixtures, strict=True):
                samples = mixture.nonzero().flatten()
                for part in samples.split(self._batch_size):
                    if len(part) > 0:
                        self._add(network, ends, part, mixture)
                        advance(len(part))
            for unit in group:
                yield self._made.pop(unit.weight)

    def _add(
        self, network: nn.Module, ends: Mapping[str, Unit], part: Tensor, mixture: Tensor
    ) -> None:
        """Run an expert on the samples `part` [p], and add its share of the units' targets by its mixture [P]."""
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
                self._add_rows(ends[weight], call, output, part, mixture)
            return output

        with evaluating(network, gradients=False), Interceptor(floating_parameters(network), visit):
            inputs = take(self._rows.inputs, part)
            logits_of(network, as_input(inputs, network))
        if calls != self._calls:
            raise StateError(
                f"an expert calls other layers than the coded network, or in another order; {SAME_CALLS}"
            )

    def _add_rows(
        self, unit: Unit, call: Call, output: Tensor, part: Tensor, mixture: Tensor
    ) -> None:
        """Add an expert's share of one unit's targets, given the output of its last call on the samples `part`."""
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
            self._made[unit.weight] = rows.new_zeros(len(mixture), *rows.shape[1:])
        share = mixture[part].to(rows)[:, None, None]
        index = part.to(rows.device)
        self._made[unit.weight].index_add_(0, index, rows * share)


def check_rows(unit: Unit, rows: int, samples: int) -> None:
    """Raise StateError where a call of a unit is not on all samples at once, as of a network that runs in chunks."""
    expected = samples * unit.shape[0]
    if rows != expected:
        raise StateError(
            f"'{unit.weight}' is called on {rows} rows for {samples} samples, expected {expected}; give networks that "
            "make the same calls and run a batch at once, not in chunks"
        )
