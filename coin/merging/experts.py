"""The inputs of a merge: experts, their statistics and their calibration samples, and their answers to these."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from coin.core.batches import Batch, map_tensors, size_of
from coin.data.calibration import Calibration, pooled
from coin.errors import ConfigurationError, DataError, StateError
from coin.files.tensors import State, check_finite
from coin.merging.expert_sources import ExpertFiles, ExpertSource
from coin.networks.adapted import Adapted
from coin.networks.adapter import Adapter
from coin.networks.calling import as_input, checked_batch, clone
from coin.networks.guard import evaluating
from coin.networks.running import Run, check_as_plain, linear_heads, run_network
from coin.networks.weights import fill_network
from coin.statistics.files import StatisticPaths
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind


def check_row(weights: Sequence[float], count: int) -> None:
    """Raise ConfigurationError unless the weights are a code row: one per expert, non-negative, summing to 1."""
    is_row = (
        len(weights) == count
        and all(weight >= 0 for weight in weights)
        and abs(sum(weights) - 1) <= 1e-6
    )
    if not is_row:
        raise ConfigurationError(
            f"found {len(weights)} weights for {count} experts, {list(weights)}, "
            "expected one each, non-negative numbers that sum to 1; give a code's row"
        )


def in_all(states: Sequence[State]) -> list[str]:
    """Return the names that all states have, in the first one's order; what is frozen in an expert has no statistic."""
    return [name for name in states[0] if all(name in state for state in states)]


def fill(network: nn.Module, state: State) -> None:
    """Copy parameters and buffers into a network; tied ones may have two names."""
    tensors = network.state_dict()  # which share the network's memory
    tensors.update({name: tensor for name, tensor in state.items() if name in tensors})
    fill_network(network, tensors, "the coded model")
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            # An expanded buffer cannot be written to.
            if name in state and not torch.equal(buffer, state[name].to(buffer.device)):
                buffer.copy_(state[name])


class Experts:
    """N experts of one architecture, with their statistics and calibration samples.

    If class counts differ, heads, given statistics and the shared initialisation are padded with zeros to the largest
    count. Statistics that are not given are computed on demand from the calibration data, and files read on demand.

    Args:
        networks: The experts, or their files with that of the shared initialisation (`ExpertFiles`).
        fishers: Every expert's Fisher diagonal.
        grams: Every expert's Gram matrices.
        initial: The shared initialisation, for methods and policies that need it.
        calibration: For every expert its own task's samples: a `coin.data.Calibration`, or batches ``[B, …]``, read
            once; of pairs (inputs, labels) the inputs.
        statistics: The files of the statistics of experts in files, in place of `fishers` and `grams`.
        train: A `coin.pipeline.steps.merge.Training` for methods that train; without one they train in memory.

    Attributes:
        source: The experts, in memory or in files; `count` is their number N.
        is_calibrated: Whether there are calibration samples.
        passes: Forward-equivalents spent so far, the cost of the merge; `seconds` went into statistics made elsewhere.

    Raises ConfigurationError for no experts or unlike ones, or arguments for other numbers; DataError if
    there is no calibration batch, or one is not of tensors of equal length; HeadError if heads cannot be padded.

    >>> every = coin.Experts([torch.nn.Linear(4, 3), torch.nn.Linear(4, 2)])
    >>> every.count, [list(each["weight"].shape) for each in every.parameters]
    (2, [[3, 4], [3, 4]])
    """

    def __init__(
        self,
        networks: Sequence[nn.Module] | ExpertSource,
        *,
        fishers: Sequence[State] | None = None,
        grams: Sequence[State] | None = None,
        initial: nn.Module | None = None,
        calibration: Sequence[Iterable[Any]] | None = None,
        statistics: StatisticPaths | None = None,
        train: Any = None,
    ) -> None:
        if not isinstance(networks, ExpertSource):
            networks = ExpertSource.of_networks(networks, initial)
        self.source = networks
        self.count = len(networks.records)
        for what, given in {"fishers": fishers, "grams": grams, "calibration": calibration}.items():
            if given is not None and len(given) != self.count:
                raise ConfigurationError(
                    f"found {what} of {len(given)} experts, expected {self.count}; give those of every expert"
                )
        self.train = train
        self.passes = 0.0
        self.seconds = 0.0
        self.given = {StatisticKind.fisher: fishers, StatisticKind.gram: grams}
        self.statistic_paths = statistics or {}
        self.statistics: dict[Statistic, Sequence[State]] = {}
        self._outputs: dict[int, Tensor] = {}  # by the part of `split`
        self.is_calibrated = calibration is not None
        of_tasks = [] if calibration is None else calibration
        self._calibration = [self._samples_of(each) for each in of_tasks]
        if self.is_calibrated:
            self._check_calibration()

    def _samples_of(self, given: Iterable[Any]) -> Calibration:
        """Return a task's samples, or its batches as samples, on the experts' device."""
        device = self.source.device
        if isinstance(given, Calibration):
            return given.on(device)
        if isinstance(given, Tensor):
            raise DataError(
                "found a tensor for a task's calibration, expected its batches; write [tensor]"
            )
        batches = []
        for batch in given:
            inputs = checked_batch(batch)
            batches.append(map_tensors(lambda tensor: tensor.to(device), inputs))
        largest = max(map(size_of, batches), default=1)
        return Calibration.of(batches, batch_size=largest, device=device)

    def _check_calibration(self) -> None:
        """Raise DataError without samples, HeadError where heads are padded and one does not give the logits."""
        if not any(each.num_samples for each in self._calibration):
            raise DataError(
                "found no calibration batches, expected at least one; give those of every task"
            )
        if isinstance(self.source, ExpertFiles) or self.source.padding is None:
            return
        first = self.pooled.inputs(torch.tensor([0]))
        for network in self.source.unpadded:
            with evaluating(network, gradients=False):
                linear_heads([network], as_input(first, network))

    def check(self, row: Sequence[float]) -> None:
        """Raise as `check_row`, and a StateError where experts' parameters are not finite."""
        check_row(row, self.count)
        for index, state in enumerate(self.parameters):
            check_finite(state, f"expert {index}")
        self._check_copies()

    @property
    def networks(self) -> Sequence[nn.Module]:
        """All experts at once."""
        return list(self.source.each_network())

    @property
    def parameters(self) -> Sequence[State]:
        """Every expert's parameters, same names and shapes; those in files are read on access."""
        return [record.parameters for record in self.source.records]

    @property
    def buffers(self) -> Sequence[State]:
        """Every expert's buffers; those in files are read on access."""
        return [record.buffers for record in self.source.records]

    def empty_model(self) -> nn.Module:
        """Return a new network of the experts' architecture, with arbitrary weights."""
        return self.source.empty_model()

    def initial(self) -> tuple[State, State]:
        """Return the shared initialisation's parameters and buffers; a ConfigurationError if there is none.

        Raises StateError where its parameters are not like the experts', or not finite.
        """
        initial = self.source.initial
        if initial is None:
            raise ConfigurationError(
                "found no shared initialisation, which the method or its BatchNorm policy 'keep' needs; give one, or "
                "choose another"
            )
        check_finite(initial.parameters, "the shared initialisation")
        return initial.parameters, initial.buffers

    def samples(self, data: DataChoice) -> Sequence[Calibration]:
        """Return for every expert the samples for its statistics: its own task's, or all tasks'."""
        if data == DataChoice.pooled:
            return [self.pooled] * self.count
        if not self.is_calibrated:
            raise ConfigurationError(
                "found no calibration inputs, which the merge needs; give them as calibration, or name the tasks"
            )
        return self._calibration

    @cached_property
    def pooled(self) -> Calibration:
        """All tasks' calibration samples, evenly interleaved."""
        return pooled(self.samples(DataChoice.own))

    @cached_property
    def tasks(self) -> Tensor:
        """Which task each pooled sample is from, int64 ``[P]``."""
        parts = torch.tensor([len(each.stored) for each in self.samples(DataChoice.own)])
        task_of_part = torch.arange(self.count).repeat_interleave(parts)
        return task_of_part[self.pooled.part]

    @cached_property
    def split(self) -> tuple[Calibration, Calibration]:
        """The pooled samples to fit on, and the last fifth of them, on which choices are made."""
        return self.pooled.split(0.2)

    def run(self, network: nn.Module, batches: Iterable[Batch], features: bool = False) -> Run:
        """Return a network's answers in eval mode (`coin.networks.run_network`), and count the passes."""
        with evaluating(network, gradients=False):
            runs = [run_network(network, as_input(batch, network), features) for batch in batches]
        run = Run(
            torch.cat([each.features for each in runs]), torch.cat([each.logits for each in runs])
        )
        self.passes += len(run.logits)
        return run

    def mixture(self, row: Sequence[float], *parts: int) -> Tensor:
        """Return Σ_i β_i f_i ``[P, C]`` on parts of `split`; the experts run once."""
        outputs = [self._run_experts(part) for part in parts]
        every = torch.cat(outputs, dim=1)  # [N, P, C]
        mixed: Tensor = torch.tensordot(every.new_tensor(row), every, dims=1)
        return mixed

    def _check_copies(self) -> None:
        """Raise StateError where a copy of the first expert with the last's tensors does not answer as the last."""
        if not self.is_calibrated or isinstance(self.source, ExpertFiles):
            return
        first, last = self.networks[0], self.networks[-1]
        self._logits(first)  # a copy has what a pass leaves in attributes
        copied = clone(first)
        fill(copied, self.source.records[-1].state)
        found = self._logits(copied)
        expected = self._logits(last)
        tolerance = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max()
        if bool(((found - expected).abs() > tolerance).any()):
            raise StateError(
                f"a copy of the first {type(first).__name__} with the last one's tensors does not answer as the last, "
                "expected a network that is its parameters and buffers; keep nothing made of them in an attribute"
            )

    def _logits(self, network: nn.Module) -> Tensor:
        """Return a network's logits on `_few` samples."""
        with evaluating(network, gradients=False):
            return run_network(network, self._few(network), features=False).logits

    def _few(self, network: nn.Module) -> Batch:
        """Return two calibration samples, or the one that there is, as a network takes them."""
        count = min(2, self.pooled.num_samples)
        return as_input(self.pooled.inputs(torch.arange(count)), network)

    def check_as_plain(self, body: nn.Module, adapters: Sequence[Adapter]) -> None:
        """Raise StateError as `coin.networks.running.check_as_plain`, on two samples if there are any."""
        if self.is_calibrated:
            adapted = Adapted(body, adapters).to(self.source.device)
            with evaluating(adapted, gradients=False):
                check_as_plain(adapted, self._few(adapted))

    def _run_experts(self, part: int) -> Tensor:
        """Return all experts' logits ``[N, P, C]`` on a part of `split`."""
        if part not in self._outputs:
            logits = []
            for index, network in enumerate(self.source.each_network()):
                run = self.run(network, self.split[part])
                check_finite({"logits": run.logits}, f"the calibration output of expert {index}")
                logits.append(run.logits)
            self._outputs[part] = torch.stack(logits)
        return self._outputs[part]
