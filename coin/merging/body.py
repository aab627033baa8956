"""A body, a network whose BatchNorms are folded into its maps, and its fit to the experts, in one pass of it."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from coin.core.devices import device_of
from coin.core.progress import progress_bar
from coin.errors import CoinWarning
from coin.files.tensors import State, check_layout, weighted_sum
from coin.merging.adapter_fit import AdapterFit
from coin.merging.expert_outputs import ExpertOutputs, check_rows, grouped
from coin.merging.experts import Experts
from coin.merging.head import fit_head
from coin.merging.regression import fit_unit, unit_outputs
from coin.merging.rounding import Rounding
from coin.merging.rows import Rows, chosen_rows
from coin.merging.units import Trace, affine_units, folded_unit, run_visited
from coin.networks.adapted import Adapted
from coin.networks.adapter import Adapter, AdapterOptions
from coin.networks.batchnorm import mark_folded
from coin.networks.calling import clone
from coin.networks.heads import head_weight, without_head
from coin.networks.weights import parameters_of, to_compute
from coin.statistics.rules import Call

MEMORY_MIB = 8192  # the bound on the activations of a fit on the CPU
SHARE = 0.5  # of what is free of a GPU's memory, the bound there
FEWEST_MIB = 64  # of experts' outputs at once: with fewer, experts run too often
MOST_LEFT = 0.1  # with a larger share of parameters that are in no unit a warning is given
UNLIKE = 8  # samples from all over the calibration data, on which rows that inputs place are seen to be out of order
DAMPING = 0.1  # relative to the inputs' mean square, of the metric by which a body that is not refitted is rounded


@dataclass(frozen=True)
class FitOptions:
    """How a body is fitted to the experts' outputs.

    Attributes:
        ridge: λ of the regressions of its units (`fit_unit`), relative; None for a body whose maps stay.
        head: Whether the head is fitted at last (`fit_head`); not with adapters, for the experts' own heads are read.
        adapters: The options of adapters, if there are any; they are fitted in the same pass.
        memory_mib: The bound on activations, in MiB; by default that of `default_memory_mib`.
    """

    ridge: float | None = None
    head: bool = False
    adapters: AdapterOptions | None = None
    memory_mib: int | None = None


class Folded(NamedTuple):
    """A body before it is fitted: a network whose BatchNorms are folded into its units.

    Attributes:
        network: The network.
        trace: Its forward pass, with the units.
        rest: The names of the parameters that are in no unit.
    """

    network: nn.Module
    trace: Trace
    rest: list[str]

    @classmethod
    @torch.inference_mode(False)
    def of(
        cls,
        network: nn.Module,
        experts: Experts,
        label: str,
        states: Sequence[State] = (),
        row: Sequence[float] = (1.0,),
    ) -> Self:
        """Return a copy of a network in which each unit is the β-average of other networks' maps, BatchNorms folded in.

        It is not the average's map with the average's BatchNorm folded in.

        Args:
            network: It has the β-average of the other networks' tensors.
            experts: Their calibration samples show its units.
            label: The method's, for a warning where much is in no unit.
            states: The other networks'; by default its own.
            row: β.
        """
        network = clone(network).to(experts.source.device).eval()
        tensors = {**parameters_of(network), **dict(network.named_buffers())}
        states = states or [tensors]
        pooled = experts.pooled
        few = torch.arange(min(3, pooled.num_samples))
        unlike = torch.linspace(pooled.num_samples - 1, 0, min(UNLIKE, pooled.num_samples)).long()
        trace = affine_units(network, pooled.inputs(few), pooled.inputs(unlike))
        experts.passes += trace.probes
        in_units: set[str | None] = set()
        for unit in trace.units:
            in_units |= {unit.weight, unit.bias, unit.end, unit.shift}
            if unit.norm is not None:
                maps = [folded_unit(network, unit, state) for state in states]
                for name, tensor in weighted_sum(maps, row).items():
                    tensors[name].copy_(tensor)
                mark_folded(network, {unit.norm: unit.weight})
        sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
        rest = sorted(sizes.keys() - in_units)
        share = sum(sizes[name] for name in rest) / sum(sizes.values())
        if share > MOST_LEFT:
            warnings.warn(
                f"method '{label}' leaves {share:.0%} of the parameters of {type(network).__name__} unfitted, such as "
                f"'{rest[0]}', of no affine map that runs once; compare it with other methods on this network",
                CoinWarning,
                stacklevel=4,
            )
        return cls(network, trace, rest)


def default_memory_mib(device: torch.device) -> int:
    """Return the bound on the activations of a fit on a device, in MiB."""
    if device.type != "cuda":
        return MEMORY_MIB
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(SHARE * free) >> 20)


@torch.inference_mode(False)
def fit_body(
    start: Folded,
    experts: Experts,
    row: Sequence[float],
    options: FitOptions,
    label: str,
    rounding: Rounding | None = None,
    adapter_fit: type[AdapterFit] = AdapterFit,
) -> tuple[nn.Module, list[Adapter]]:
    """Return a copy of a body, fitted to the experts' outputs on the calibration samples, and its adapters.

    1. What is in no unit is rounded to the nearest, if anything is rounded.
    2. Of the samples whose activations fit the memory, positions are chosen as the rows of regressions (`chosen_rows`).
    3. The copy runs once on these samples. Just before a unit's call, with all units before it fitted already, its
       inputs a and the experts' outputs z make a regression, in which the unit is fitted, then rounded, then its
       adapters are fitted (`fit_units`).
    4. Without adapters the head is fitted to Σ_i β_i f_i at last, for which the copy runs once more (`fit_head`).

    Args:
        start: The body before it is fitted.
        experts: The experts, with calibration samples.
        row: β.
        options: What is fitted.
        label: The method's, for messages.
        rounding: What rounds matrices, if they are.
        adapter_fit: What fits adapters.

    Raises StateError where an expert makes the body's calls in another order or number, DataError where a task with a
    share has no samples that fit the memory, NumericalError where a regression breaks down. Warns where not all samples
    fit.
    """
    network = clone(start.network)
    if rounding is not None:
        _round_rest(network, start.rest, rounding)
    units = start.trace.units
    memory_mib = options.memory_mib or default_memory_mib(device_of(network))
    samples = _samples_that_fit(start.trace, experts, label, memory_mib)
    adapters: AdapterFit | None = None
    if options.adapters is not None:
        units = [unit for unit in units if unit.weight != head_weight(network)]
        samples = samples[experts.tasks[samples].argsort(stable=True)]  # task by task
        states = [record.state for record in experts.source.records]
        adapters = adapter_fit(network, options.adapters, states, row)
    budget = max(memory_mib // 4, FEWEST_MIB) << 20
    inputs = experts.pooled.inputs(samples)
    rows = chosen_rows(network, units, inputs, experts.tasks[samples], row, budget)
    groups = grouped(units, rows, budget)
    passes = len(groups) * int(rows.shares.count_nonzero())
    doing = "layers" if rounding is None else "layers again, rounded"
    with progress_bar(f"{label}, {doing}", passes) as bar:
        outputs = ExpertOutputs(experts, start.trace.calls, rows, groups, bar.update)
        fit_units(network, rows, outputs, options.ridge, rounding, adapters)
    experts.passes += rows.passes + passes + len(samples)
    if adapters is not None:
        return network, adapters.adapters
    if options.head:
        fit_head(network, experts, row, rounding)
    return network, []


def _round_rest(network: nn.Module, rest: Sequence[str], rounding: Rounding) -> None:
    """Round the parameters that are in no unit to the nearest, in place."""
    for name in rest:
        if rounding.takes(name):
            parameter = network.get_parameter(name).data
            parameter.copy_(rounding.round(name, parameter))


def _samples_that_fit(trace: Trace, experts: Experts, label: str, memory_mib: int) -> Tensor:
    """Return the places of the pooled samples whose activations fit the memory; warn where these are not all."""
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
    return torch.arange(samples)


def fit_units(
    network: nn.Module,
    rows: Rows,
    outputs: ExpertOutputs,
    ridge: float | None,
    rounding: Rounding | None,
    adapters: AdapterFit | None,
) -> None:
    """Run a body once on all samples, and fit every unit in place just before its call.

    Without a ridge a unit stays, but for its rounding, in which its own outputs are wanted. With adapters these are
    fitted too, and every sample goes on with its own.
    """

    def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> Tensor | None:
        unit = outputs.units.get(names.get("weight", ""))
        if unit is None:
            return None
        targets = outputs.take(unit)
        check_rows(unit, len(call.inputs), len(targets))
        regression = rows.regression(unit, call, targets)
        by_task = adapters is not None
        rounds = rounding if rounding is not None and rounding.takes(unit.weight) else None
        if ridge is not None:
            fit_unit(network, unit, regression, ridge, rounds, by_task)
        elif rounds is not None:
            own = regression._replace(targets=unit_outputs(network, unit, regression.inputs))
            fit_unit(network, unit, own, DAMPING, rounds, by_task)
        return None if adapters is None else adapters.fit(unit, call, regression)

    run_visited(network, rows.inputs, visit)


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
    options = FitOptions(adapters=AdapterOptions(rank, ridge, scales))
    home = device_of(experts[0])
    every = Experts(to_compute([*experts], home), calibration=calibration)
    own = _without_head(body, parameters_of(body))
    expected = _without_head(body, every.parameters[0])
    check_layout(expected, own, "the body")
    label = "fit_adapters"
    row = [1 / every.count] * every.count
    fitted, adapters = fit_body(Folded.of(body, every, label), every, row, options, label)
    every.check_as_plain(fitted, adapters)
    return Adapted(fitted, adapters).to(home)


def _without_head(body: nn.Module, state: State) -> State:
    """Return a state without the head's tensors."""
    names = without_head(body, list(state))
    return {name: state[name] for name in names}
