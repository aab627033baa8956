"""The two passes of a fit: experts leave their outputs, and a body and its adapters are fitted to them by units."""

import math
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from coin.core.batches import Batch, samples_of, take
from coin.core.devices import device_of
from coin.core.progress import progress_bar
from coin.errors import CoinWarning, DataError, StateError
from coin.files.tensors import State, check_layout, weighted_sum
from coin.merging.adapter_fit import AdapterFit, rank_of
from coin.merging.expert_sources import one_device
from coin.merging.experts import Experts
from coin.merging.units import (
    SAME_CALLS,
    Trace,
    Unit,
    affine_units,
    fit_unit,
    floating_parameters,
    folded_unit,
    input_rows,
    output_rows,
)
from coin.networks.adapted import Adapted
from coin.networks.adapter import Adapter, AdapterOptions
from coin.networks.batchnorm import mark_folded
from coin.networks.calling import Forward, as_input, called_by, clone, plain
from coin.networks.compressed import Rounding
from coin.networks.guard import differentiable, evaluating
from coin.networks.heads import head_name, without_head
from coin.networks.weights import parameters_of, tensors_of, to_compute
from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call
from coin.statistics.sums import sum_type

MEMORY_MIB = 8192  # the bound on the activations of a fit on the CPU
SHARE = 0.5  # of what is free of a GPU's memory, the bound there
FEWEST_MIB = 64  # of experts' outputs at once: with fewer, experts run too often
ROWS = 8  # of a regression for each of its unknowns: more where they are cheap, fewer where they are dear
CHEAP, DEAR = 0.5, 4.0  # shares of the time of a layer's calls that its rows take at least, and at most
READ = 16  # multiplications that take as long as reading a number where it lies alone
LEAST = 256  # rows of a regression, where there are as many
MOST_KEPT = 0.1  # with a larger share of parameters that are in no unit a warning is given
NO_ADAPTERS = "has no adapters"
UNLIKE = 8  # samples from all over the calibration data, on which rows that inputs place are seen to be out of order
PROBED = 16  # samples by which positions are weighed: rows of tokens are much alike from sample to sample


class Rows(NamedTuple):
    """What units are fitted to on P samples; `places` and `weights` are by the names of the units' weights."""

    inputs: Batch
    mixtures: Tensor  # every sample's mixture of the experts' outputs [N, P]
    shares: Tensor  # what the samples weigh [P]
    places: Mapping[str, Tensor | None]  # of `chosen_places`
    weights: Mapping[str, Tensor]  # of `position_weights`
    passes: int  # that finding the weights took


def objective(row: Sequence[float], task: Tensor, own_share: float) -> tuple[Tensor, Tensor]:
    """Return what the units are fitted to: every sample's mixture of the experts [N, P], and its weight [P].

    It is `own_share` the sum over tasks, each with its own expert, and for the rest the β-average on all samples.
    """
    # A sum of squares whose targets differ is, up to a constant, one with the weighted mean of the targets.
    beta = torch.tensor(row, dtype=torch.float64)
    # Every task's own samples weigh β_i together; in the mixture all samples weigh alike.
    counts = torch.bincount(task, minlength=len(row))
    own = own_share * (beta / counts)[task]
    mixed = torch.full_like(own, (1 - own_share) / len(task))
    shares = own + mixed
    lost = ((beta > 0) & (counts == 0)).nonzero().flatten().tolist() if own_share == 1 else []
    if lost:
        told = f"found no calibration samples of task {lost[0]}, which has a share in the code row {list(row)}"
        raise DataError(f"{told}, expected at least one; give some, raise memory_mib, or use target=both")
    mixtures = torch.outer(beta, mixed)
    mixtures[task, torch.arange(len(task))] += own
    return mixtures / shares.where(shares > 0, 1), shares


def chosen_rows(
    network: nn.Module, trace: Trace, inputs: Batch, task: Tensor, mixtures: Tensor, shares: Tensor, budget: float
) -> Rows:
    """Choose the rows of all units of a network on P samples, which are of these tasks [P]; see `Rows`."""
    experts = len(mixtures)
    order = torch.nn.functional.one_hot(task, experts).cumsum(0)[torch.arange(len(task)), task] - 1
    probed = (order < math.ceil(PROBED / experts)).nonzero().flatten()
    weights = position_weights(network, trace, take(inputs, probed))
    places = chosen_places(trace.units, order, weights, device_of(network), budget)
    return Rows(inputs, mixtures, shares, places, weights, 3 * len(probed) if weights else 0)


def chosen_places(
    units: Sequence[Unit], order: Tensor, weights: Mapping[str, Tensor], device: torch.device, budget: float = math.inf
) -> dict[str, Tensor | None]:
    """Return by units' weights at which positions of every sample the rows are [P, q]; none for all positions.

    They are drawn as often as they weigh, one from each of q stretches of the same weight, and by the sample's place
    `order` [P] in its task, so that the order of the tasks does not matter. Where the rows' outputs would take more
    bytes than the budget there are only `ROWS` for each unknown.
    """
    places: dict[str, Tensor | None] = {}
    generator, samples = torch.Generator().manual_seed(0), len(order)

    def rows_of(unit: Unit, few: bool) -> int:
        cheap, dear = (_affordable(unit, share * samples) for share in (CHEAP, DEAR))
        rows = max(LEAST, min(ROWS * unit.unknowns if few else max(ROWS * unit.unknowns, cheap), dear))
        return math.ceil(rows / samples)

    few = sum(samples * unit.target_bytes(rows_of(unit, few=False)) for unit in units) > budget
    for unit in units:
        each = rows_of(unit, few)
        places[unit.weight] = None
        if each < unit.positions:
            drawn = torch.rand(int(order.max()) + 1, each, generator=generator)[order]
            drawn = (drawn + torch.arange(each)) / each
            weight = weights.get(unit.weight, torch.ones(unit.positions)).cpu().cumsum(0)
            found = torch.searchsorted((weight / weight[-1]).to(drawn), drawn)
            places[unit.weight] = found.clamp(max=unit.positions - 1).to(device)
    return places


def _affordable(unit: Unit, samples: float) -> float:
    """Return how many rows' regression takes as long as the unit's calls on so many samples."""
    # With K unknowns for each of O outputs n rows take n K (min(n, K) + 2 O + READ) multiplications, a position K O.
    k, o, calls = unit.unknowns, unit.outputs, samples * unit.positions * unit.outputs
    each = 2 * o + READ
    return calls / (k + each) if calls > k * (k + each) else math.sqrt(each * each / 4 + calls) - each / 2


def position_weights(network: nn.Module, trace: Trace, inputs: Batch) -> dict[str, Tensor]:
    """Return, by the weights of units that are no convolutions, what the positions weigh [L], with mean 1.

    One half is the same for all; the other goes with the mean square over samples of the gradient of ½‖f‖² by the
    unit's outputs there, f less its mean over the classes: a transformer's last layers matter at the class token alone.
    A unit that the outputs do not reach has none.
    """
    ends = {unit.end: unit for unit in trace.units if unit.positions > 1 and not unit.is_convolution}
    parameters = floating_parameters(network)
    outputs: dict[str, tuple[Call, Tensor]] = {}
    sums: dict[str, Tensor] = {}
    if not ends:
        return {}

    def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> Tensor | None:
        if (unit := ends.get(names.get("weight", ""))) is None:
            return None
        output = function()
        outputs[unit.weight] = call, output
        return output.clone()  # which may be changed in place

    with evaluating(network), differentiable(parameters.values()), Interceptor(parameters, visit):
        for sample in samples_of(inputs):  # the graphs of many at once take much memory
            outputs.clear()
            logits = network(as_input(sample, network))
            cotangent = (logits - logits.mean(1, keepdim=True) if logits.shape[1] > 1 else logits).detach()
            found = [each for each in outputs.items() if each[1][1].requires_grad]
            gradients = torch.autograd.grad(logits, [output for _, (_, output) in found], cotangent, allow_unused=True)
            for (weight, (call, _)), gradient in zip(found, gradients, strict=True):
                if gradient is not None:
                    squares = output_rows(call, gradient, 1, None).double().square().sum(1)
                    sums[weight] = squares + sums.get(weight, 0)
    return {weight: 0.5 + 0.5 * each / each.mean() for weight, each in sums.items() if bool(each.any())}


class ExpertOutputs:
    """The mixtures of the experts' outputs to which the units of a trace are fitted, made on demand in their order.

    As many units at once as fit into `budget` bytes, one at least; for each such group every expert runs on the samples
    of whose mixtures it is part, `batch_size` at once. `passes` counts these; `advance` gets the progress to `total`.
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
            size = samples * unit.target_bytes(unit.positions if at is None else at.shape[1])
            if left < size:
                self._groups.append([])
                left = budget
            self._groups[-1].append(unit)
            left -= size
        self._samples, self._units, self._popped = samples, len(trace.units), 0
        self.passes, self.total = 0, len(self._groups) * int(rows.mixtures.count_nonzero()) + samples
        self.advance: Callable[[int], None] = lambda _: None

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
        # The coded network's own pass, a share of its samples for each unit: whole ones, which sum to all.
        before = self._popped * self._samples // self._units
        self._popped += 1
        self.advance(self._popped * self._samples // self._units - before)
        return self._made.pop(weight)

    def _add(self, network: nn.Module, ends: Mapping[str, Unit], part: Tensor, mixture: Tensor) -> None:
        """Run an expert on the samples `part` [p], and add its share of some units' targets, of the mixtures [P]."""
        known, made = set(self._trace.calls), list[str]()

        def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> Tensor | None:
            if (weight := names.get("weight", "")) not in known:
                return None
            made.append(weight)
            output = function()
            if unit := ends.get(weight):
                if len(output) % len(part):
                    check_rows(unit, len(output), len(part))
                shape = (len(output) // len(part), *output.shape[1:])
                if shape != unit.shape:
                    found = f"'{weight}' gives {[*shape]} a sample in an expert and {[*unit.shape]}"
                    raise StateError(f"{found} in the coded network; {SAME_CALLS}")
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
        if made != self._trace.calls:
            raise StateError(f"an expert calls other layers than the coded network, or in another order; {SAME_CALLS}")


def check_rows(unit: Unit, rows: int, samples: int) -> None:
    """Raise StateError where a call of a unit is not on all samples at once, as of a network that runs in chunks."""
    expected = samples * unit.shape[0]
    if rows != expected:
        found = f"'{unit.weight}' is called on {rows} rows for {samples} samples, expected {expected}"
        raise StateError(f"{found}; give a network that runs a batch at once, not in chunks")


def fit_in_order(
    network: nn.Module, trace: Trace, rows: Rows, targets: ExpertOutputs, ridge: float | None,
    rounding: Rounding | None = None, adapters: AdapterFit | None = None,
) -> None:  # fmt: skip
    """Run the coded network once, fitting every unit of its trace in place before its call (`fit_unit`).

    Without a ridge the units stay; with `adapters` these are fitted too, and every sample goes on with its own.
    """
    waiting = {unit.weight: unit for unit in trace.units}

    def visit(call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> Tensor | None:
        if unit := waiting.get(names.get("weight", "")):
            target, at = targets.pop(unit.weight), rows.places[unit.weight]
            check_rows(unit, len(call.inputs), len(target))
            mine = rows.shares.to(target)[:, None].expand(target.shape[:2])
            if at is None and unit.weight in rows.weights:  # chosen places are drawn by these weights already
                mine = mine * rows.weights[unit.weight].to(mine)
            rounds = rounding if rounding is not None and rounding.takes(unit.weight) else None
            found, tasks = input_rows(call, len(mine), at), None if adapters is None else adapters.tasks
            if ridge is not None:
                fit_unit(network, unit, call, target, mine, ridge, found, rounds, tasks)
            if adapters is not None:
                return adapters.fit(network, unit, call, found, target, mine, function)
        return None

    with evaluating(network, gradients=False), Interceptor(floating_parameters(network), visit):
        network(as_input(rows.inputs, network))


class Body(NamedTuple):
    """A network with its BatchNorms folded in, its pass with the units to fit, and the parameters that stay."""

    network: nn.Module
    trace: Trace
    kept: list[str]

    @classmethod
    def of(
        cls, network: nn.Module, experts: Experts, states: Sequence[tuple[State, State]], row: Sequence[float]
    ) -> Self:
        """Return a network, changed in place, as the β-average of other networks' folded maps."""
        every = experts.pooled.num_samples
        unlike = torch.linspace(every - 1, 0, min(UNLIKE, every)).long()
        inputs = experts.pooled.inputs
        trace = affine_units(network, inputs(torch.arange(min(3, every))), inputs(unlike))
        experts.passes += trace.probes
        known: list[State] = [ChainMap(*cast(Any, each)) for each in states]  # never written to
        tensors = dict(chain(network.named_parameters(), network.named_buffers()))
        for unit in trace.units:
            if unit.norm is not None:
                maps = [folded_unit(network, unit, state) for state in known]
                with torch.no_grad():
                    for name, tensor in weighted_sum(maps, row).items():
                        tensors[name].copy_(tensor)
                mark_folded(network, {unit.norm: unit.weight})
        fitted = {name for unit in trace.units for name in (unit.weight, unit.bias, unit.end, unit.shift)}
        return cls(network, trace, sorted(parameters_of(network).keys() - fitted))


def default_memory_mib(device: torch.device) -> int:
    """Return the bound on the activations of a fit on a device, in MiB."""
    if device.type != "cuda":
        return MEMORY_MIB
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(SHARE * free) >> 20)


def warn_of_kept(body: Body, label: str, what: str) -> None:
    """Warn where more than a tenth of a body's parameters are in no unit; `what` says what a method does of these."""
    sizes = {name: parameter.numel() for name, parameter in body.network.named_parameters()}
    share = sum(sizes[name] for name in body.kept) / sum(sizes.values())
    if share > MOST_KEPT:
        kind = type(body.network).__name__
        told = f"method '{label}' {what} of {share:.0%} of the parameters of {kind}, such as '{body.kept[0]}'"
        told = f"{told}, of no affine map that runs once; compare it with other methods on this network"
        warnings.warn(told, CoinWarning, stacklevel=3)


def fit_body(
    body: Body, experts: Experts, row: Sequence[float], label: str, *, ridge: float | None, own_share: float = 1.0,
    rounding: Rounding | None = None, adapters: AdapterOptions | None = None, memory_mib: int | None = None,
) -> tuple[nn.Module, list[Adapter]]:  # fmt: skip
    """Return a copy of a body, refitted to the `objective`, its matrices rounded, if so; and its adapters.

    Without a ridge its units stay. With options of adapters these are fitted in the same pass, else there are none;
    their experts' own heads are read in place of the body's, which stays. Where memory runs out, the error's note says
    what `memory_mib` to set.
    """
    network, trace, fit = clone(body.network), body.trace, None
    memory_mib = memory_mib or default_memory_mib(device_of(network))
    if rounding is not None:
        for name in filter(rounding.takes, body.kept):
            network.get_parameter(name).data.copy_(rounding.round(name, network.get_parameter(name).data))
    every = experts.pooled.num_samples
    samples = min(every, max(experts.count, (memory_mib << 20) // (4 * trace.floats)))
    if samples < every:
        needed = math.ceil(4 * trace.floats * every / 2**20)
        told = f"method '{label}' fits its layers on {samples} of {every} calibration samples, which need"
        warnings.warn(f"{told} memory_mib={needed}; found {memory_mib}", CoinWarning, stacklevel=4)
    chosen = torch.arange(samples)
    if adapters is not None:
        chosen = experts.tasks[:samples].argsort(stable=True)  # whose rows then lie together
        head = f"{head_name(network)}.weight".lstrip(".")
        trace = trace._replace(units=[unit for unit in trace.units if unit.weight != head])
        fit = AdapterFit(
            rank_of(adapters, trace.units, experts.count),
            adapters.ridge,
            experts.source.tensors,
            experts.tasks[chosen],
            row,
        )
    inputs, task = experts.pooled.inputs(chosen), experts.tasks[chosen]
    budget = max(memory_mib // 4, FEWEST_MIB) << 20
    rows = chosen_rows(network, trace, inputs, task, *objective(row, task, own_share), budget)
    targets = ExpertOutputs(experts.source.each_network, trace, rows, experts.pooled.batch_size, budget)
    doing = "layers" if rounding is None else "layers again, rounded"
    with progress_bar(f"{label}, {doing}", targets.total) as bar:
        targets.advance = bar.update
        try:
            fit_in_order(network, trace, rows, targets, ridge, rounding, fit)
        except torch.OutOfMemoryError as error:
            told = f"method '{label}' was fitted with memory_mib={memory_mib}"
            error.add_note(f"{told}; set memory_mib={max(1, memory_mib // 2)}")
            raise
    experts.passes += rows.passes + targets.passes + samples
    if fit is None:
        return network, []
    fit.check()
    return network, fit.adapters


@torch.inference_mode(False)
def adapt(
    network: nn.Module, experts: Experts, row: Sequence[float], label: str, options: AdapterOptions
) -> tuple[nn.Module, list[Adapter]]:
    """Return a copy of a network, its BatchNorms folded, and adapters for all experts that have a share in the row.

    It is in eval mode and called in its own way; while it is fitted, as the experts are.
    """
    copied = plain(clone(network)).to(experts.source.device).eval()
    called = called_by(copied, experts.forward)  # as the experts are
    body = Body.of(called, experts, [tensors_of(copied)], [1.0])
    warn_of_kept(body, label, NO_ADAPTERS)
    fitted, adapters = fit_body(body, experts, row, label, ridge=None, adapters=options)
    return plain(fitted), adapters


def fit_adapters(
    body: nn.Module, experts: Sequence[nn.Module], calibration: Sequence[Iterable[Any]], *, rank: int | None = None,
    memory_mib: float | None = None, ridge: float = 0.1, forward: Forward | None = None,
) -> Adapted:  # fmt: skip
    """Return a body, left as it is, with adapters for experts of its architecture; see `AdapterFit`.

    Args:
        body: Any network of the experts' architecture: a coded model, a compressed one, the experts' common base.
        experts: The N experts.
        calibration: For every expert the batches of its own task's samples, without labels.
        rank: r of the corrections, 4 unless `memory_mib` is given.
        memory_mib: In place of a rank; see `AdapterOptions`.
        ridge: μ, relative.
        forward: (network, batch) → logits ``[B, C]``, for networks that are not called with one tensor. The result is
            called in the networks' own way; `coin.Coded` takes the same function.

    >>> networks = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)) for _ in experts]
    >>> adapted = coin.fit_adapters(networks[0], networks, inputs, rank=4)
    >>> again = adapted.network(2, head=networks[2][1])  # a plain network
    >>> torch.allclose(again(inputs[2][0]), networks[2](inputs[2][0]), atol=0.2)  # corrections in 4 bits
    True
    """
    options = AdapterOptions(4 if rank is None and memory_mib is None else rank, memory_mib, ridge)
    home = one_device(experts)
    every = Experts(to_compute([*experts], home), calibration=calibration, forward=forward)
    states = (every.parameters[0], parameters_of(body))
    known, own = ({name: state[name] for name in without_head(body, [*state])} for state in states)
    check_layout(known, own, "the body")
    return Adapted(*adapt(body, every, [1 / every.count] * every.count, "fit_adapters", options)).to(home)
