"""The fit of a body and its adapters, unit by unit, in one pass of the coded network."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from coin.core.devices import device_of
from coin.core.progress import progress_bar
from coin.errors import CoinWarning
from coin.files.tensors import State, check_layout, weighted_sum
from coin.merging.adapter_fit import AdapterFit
from coin.merging.expert_outputs import ExpertOutputs, check_rows, sample_weights
from coin.merging.expert_sources import whole_state
from coin.merging.experts import Experts
from coin.merging.rounding import Rounding
from coin.merging.rows import Rows, chosen_rows
from coin.merging.units import (
    Trace,
    UnitRows,
    affine_units,
    fit_unit,
    floating_parameters,
    folded_unit,
    input_rows,
)
from coin.networks.adapted import Adapted
from coin.networks.adapter import Adapter, AdapterOptions
from coin.networks.batchnorm import mark_folded
from coin.networks.calling import as_input, clone, logits_of
from coin.networks.guard import evaluating
from coin.networks.heads import head_weight, without_head
from coin.networks.weights import parameters_of, tensors_of, to_compute
from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call

MEMORY_MIB = 8192  # the bound on the activations of a fit on the CPU
SHARE = 0.5  # of what is free of a GPU's memory, the bound there
FEWEST_MIB = 64  # of experts' outputs at once: with fewer, experts run too often
MOST_KEPT = 0.1  # with a larger share of parameters that are in no unit a warning is given
NO_ADAPTERS = "has no adapters"
UNLIKE = 8  # samples from all over the calibration data, on which rows that inputs place are seen to be out of order


class Body(NamedTuple):
    """A network with its BatchNorms folded in, its pass with the units to fit, and the parameters that stay."""

    network: nn.Module
    trace: Trace
    kept: list[str]

    @classmethod
    def of(
        cls,
        network: nn.Module,
        experts: Experts,
        states: Sequence[tuple[State, State]],
        row: Sequence[float],
    ) -> Self:
        """Return a network, changed in place, as the β-average of other networks' folded maps.

        Args:
            network: It has the β-average of the other networks' tensors.
            experts: Their calibration samples show its units.
            states: The other networks' parameters and buffers.
            row: β.
        """
        pooled = experts.pooled
        few = torch.arange(min(3, pooled.num_samples))
        unlike = torch.linspace(pooled.num_samples - 1, 0, min(UNLIKE, pooled.num_samples)).long()
        trace = affine_units(network, pooled.inputs(few), pooled.inputs(unlike))
        experts.passes += trace.probes
        tensors = {**parameters_of(network), **dict(network.named_buffers())}
        fitted: set[str | None] = set()
        for unit in trace.units:
            fitted |= {unit.weight, unit.bias, unit.end, unit.shift}
            if unit.norm is not None:
                maps = [folded_unit(network, unit, whole_state(state)) for state in states]
                for name, tensor in weighted_sum(maps, row).items():
                    tensors[name].copy_(tensor)
                mark_folded(network, {unit.norm: unit.weight})
        return cls(network, trace, sorted(parameters_of(network).keys() - fitted))

    def warn_of_kept(self, label: str, what: str) -> None:
        """Warn where more than a tenth of the parameters are in no unit; `what` says what the method does of these."""
        sizes = {name: parameter.numel() for name, parameter in self.network.named_parameters()}
        share = sum(sizes[name] for name in self.kept) / sum(sizes.values())
        if share > MOST_KEPT:
            warnings.warn(
                f"method '{label}' {what} of {share:.0%} of the parameters of {type(self.network).__name__}, such as "
                f"'{self.kept[0]}', of no affine map that runs once; compare it with other methods on this network",
                CoinWarning,
                stacklevel=3,
            )


def default_memory_mib(device: torch.device) -> int:
    """Return the bound on the activations of a fit on a device, in MiB."""
    if device.type != "cuda":
        return MEMORY_MIB
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(SHARE * free) >> 20)


def fit_body(
    body: Body,
    experts: Experts,
    row: Sequence[float],
    label: str,
    *,
    ridge: float | None,
    rounding: Rounding | None = None,
    adapters: AdapterOptions | None = None,
    adapter_fit: type[AdapterFit] = AdapterFit,
    memory_mib: int | None = None,
) -> tuple[nn.Module, list[Adapter]]:
    """Return a copy of a body, refitted to the experts' outputs, its matrices rounded, if so; and its adapters.

    Where memory runs out, the error's note says what `memory_mib` to set.

    Args:
        body: The body.
        experts: The experts, with calibration samples.
        row: β.
        label: The method's, for messages.
        ridge: λ of the units' regressions; without one they are not refitted.
        rounding: What rounds matrices, if they are.
        adapters: Options of adapters, which are fitted in the same pass; they leave the head to the experts' own.
        adapter_fit: What fits them.
        memory_mib: Bound on activations; by default that of `default_memory_mib`.
    """
    network = clone(body.network)
    if rounding is not None:
        _round_kept(network, body.kept, rounding)
    memory_mib = memory_mib or default_memory_mib(device_of(network))
    pooled = experts.pooled
    chosen = torch.arange(_samples_that_fit(body.trace, experts, label, memory_mib))
    trace = body.trace
    fit: AdapterFit | None = None
    if adapters is not None:
        # A task's rows then lie together.
        chosen = chosen[experts.tasks[chosen].argsort(stable=True)]
        head = head_weight(network)
        trace = trace._replace(units=[unit for unit in trace.units if unit.weight != head])
        fit = adapter_fit(network, adapters, experts.source.tensors, experts.tasks[chosen], row)
    task = experts.tasks[chosen]
    shares = sample_weights(row, task)
    budget = max(memory_mib // 4, FEWEST_MIB) << 20
    rows = chosen_rows(network, trace, pooled.inputs(chosen), task, shares, budget)
    outputs = ExpertOutputs(experts.source.each_network, trace, rows, pooled.batch_size, budget)
    doing = "layers" if rounding is None else "layers again, rounded"
    with progress_bar(f"{label}, {doing}", outputs.passes) as bar:
        targets = outputs.each_unit(bar.update)
        try:
            fit_in_order(network, trace, rows, targets, ridge, rounding, fit)
        except torch.OutOfMemoryError as error:
            half = max(1, memory_mib // 2)
            error.add_note(
                f"method '{label}' was fitted with memory_mib={memory_mib}; set memory_mib={half}"
            )
            raise
    experts.passes += rows.passes + outputs.passes + len(chosen)
    if fit is None:
        return network, []
    return network, fit.adapters


def _round_kept(network: nn.Module, kept: Sequence[str], rounding: Rounding) -> None:
    """Round the parameters that are not refitted, in place."""
    for name in kept:
        if rounding.takes(name):
            parameter = network.get_parameter(name).data
            parameter.copy_(rounding.round(name, parameter))


def _samples_that_fit(trace: Trace, experts: Experts, label: str, memory_mib: int) -> int:
    """Return of how many pooled samples the activations fit the memory; warn where these are not all."""
    every = experts.pooled.num_samples
    bytes_each = 4 * trace.floats
    fitting = (memory_mib << 20) // bytes_each
    samples = min(every, max(experts.count, fitting))
    if samples < every:
        needed = math.ceil(bytes_each * every / 2**20)
        warnings.warn(
            f"method '{label}' fits its layers on {samples} of {every} calibration samples, which need "
            f"memory_mib={needed}; found {memory_mib}",
            CoinWarning,
            stacklevel=5,
        )
    return samples


def fit_in_order(
    network: nn.Module,
    trace: Trace,
    rows: Rows,
    targets: Iterator[Tensor],
    ridge: float | None,
    rounding: Rounding | None = None,
    adapters: AdapterFit | None = None,
) -> None:
    """Run the coded network once, fitting every unit of its trace to its targets, in place just before its call.

    Without a ridge the units stay, but for a rounding; with `adapters` these are fitted too, and every sample goes on
    with its own.
    """
    units = {unit.weight: unit for unit in trace.units}
    tasks = None if adapters is None else adapters.tasks

    def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> Tensor | None:
        unit = units.get(names.get("weight", ""))
        if unit is None:
            return None
        target = next(targets)  # [P, q, ·]
        check_rows(unit, len(call.inputs), len(target))
        places = rows.places[unit.weight]
        inputs, entries = input_rows(call, len(target), places)
        weights = rows.shares.to(target)[:, None].expand(target.shape[:2])
        # Chosen places are drawn by these weights already.
        if places is None and unit.weight in rows.weights:
            weights = weights * rows.weights[unit.weight].to(weights)
        regression = UnitRows(inputs, entries, target, weights)
        rounds = rounding if rounding is not None and rounding.takes(unit.weight) else None
        if ridge is not None or rounds is not None:
            fit_unit(network, unit, call, regression, ridge, rounds, tasks)
        return None if adapters is None else adapters.fit(unit, call, regression)

    with evaluating(network, gradients=False), Interceptor(floating_parameters(network), visit):
        logits_of(network, as_input(rows.inputs, network))


def folded_body(network: nn.Module, experts: Experts, label: str) -> Body:
    """Return a copy of a network in eval mode as a body, its BatchNorms folded."""
    copied = clone(network).to(experts.source.device).eval()
    body = Body.of(copied, experts, [tensors_of(copied)], [1.0])
    body.warn_of_kept(label, NO_ADAPTERS)
    return body


def fit_adapters(
    body: nn.Module,
    experts: Sequence[nn.Module],
    calibration: Sequence[Iterable[Any]],
    *,
    rank: int = 4,
    ridge: float = 0.1,
    scales: bool = True,
) -> Adapted:
    """Return a body, left as it is, with adapters for experts of its architecture; see `AdapterFit`.

    Args:
        body: Any network of the experts' architecture: a coded model, a compressed one, the experts' common base.
        experts: The N experts.
        calibration: For every expert the batches of its own task's samples, without labels.
        rank: r of the corrections.
        ridge: μ, relative.
        scales: Whether there are scales and biases beside the corrections, as in `AdapterOptions`.

    >>> networks = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)) for _ in experts]
    >>> adapted = coin.fit_adapters(networks[0], networks, inputs, rank=4)
    >>> again = adapted.network(2, head=networks[2][1])  # a plain network
    >>> torch.allclose(again(inputs[2][0]), networks[2](inputs[2][0]), atol=0.2)  # corrections in 4 bits
    True
    """
    options = AdapterOptions(rank, ridge, scales)
    home = device_of(experts[0])
    every = Experts(to_compute([*experts], home), calibration=calibration)
    own = _without_head(body, parameters_of(body))
    expected = _without_head(body, every.parameters[0])
    check_layout(expected, own, "the body")
    row = [1 / every.count] * every.count
    label = "fit_adapters"
    with torch.inference_mode(False):
        folded = folded_body(body, every, label)
        fitted, adapters = fit_body(folded, every, row, label, ridge=None, adapters=options)
    every.check_as_plain(fitted, adapters)
    return Adapted(fitted, adapters).to(home)


def _without_head(body: nn.Module, state: State) -> State:
    """Return a state without the head's tensors."""
    names = without_head(body, list(state))
    return {name: state[name] for name in names}
