"""What a merge is made of: the experts, their statistics and their calibration data, each computed when asked for."""

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from operator import itemgetter
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from coin.batches import Batch, Forward, adapted, as_input, checked, clone, joined, samples_of, shapes_in, size_of, take
from coin.data import Calibration, pooled
from coin.errors import ConfigurationError, DataError, HeadError
from coin.files.tensors import State, check_finite
from coin.networks.batchnorm import has_batchnorm
from coin.networks.heads import head_name, linear_heads, of_one_width, pad_logits, padded_rows, widened
from coin.networks.stages import Run, run_network
from coin.statistics import TRANSPOSED, FisherKind, fisher_sums, gram_sums, process_generator
from coin.statistics.guard import evaluating, trainable
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind

HELD_OUT = 0.2
"""The share of the pooled calibration samples on which choices are made."""

Given = Sequence[State] | Mapping[str, Sequence[State]]
"""Every expert's statistic; or several of them, by the data that they are of: ``own``, ``pooled``."""


@dataclass(frozen=True)
class MemoryCalibration(Calibration):
    """Calibration samples in memory, as batches of one ``[1, …]``, in which `position` is a sample's place."""

    samples: Sequence[Batch] = ()

    @classmethod
    def of_tasks(cls, tasks: Sequence[Sequence[Batch]]) -> Self:
        """Return all tasks' samples, evenly interleaved, in batches as large as the largest given.

        Every stretch of them holds the tasks in proportion: batches, whose statistics BatchNorm may take, and the
        held-out end.
        """
        placed = []
        for task, batches in enumerate(tasks):
            samples = [sample for batch in batches for sample in samples_of(batch)]
            placed += [((place + 0.5) / len(samples), task, sample) for place, sample in enumerate(samples)]
        placed.sort(key=itemgetter(0, 1))
        size = max(size_of(batch) for batches in tasks for batch in batches)
        part = torch.tensor([task for _, task, _ in placed], dtype=torch.int64)
        return cls.of_samples([sample for _, _, sample in placed], part, len(tasks), size)

    @classmethod
    def of_samples(cls, samples: Sequence[Batch], part: Tensor, tasks: int, batch_size: int) -> Self:
        """Return samples of so many tasks in this order."""
        return cls(cast(Any, (None,) * tasks), part, torch.arange(len(samples)), 0, batch_size, samples)

    def __iter__(self) -> Iterator[Any]:
        """Yield batches, a new one wherever the shape of the samples changes."""
        batches: list[list[Batch]] = []
        for sample in map(self.samples.__getitem__, self.position.tolist()):
            if not batches or len(batches[-1]) == self.batch_size or shapes_in(batches[-1][0]) != shapes_in(sample):
                batches.append([])
            batches[-1].append(sample)
        return map(joined, batches)

    def inputs(self, chosen: Tensor | None = None, view: Any = None) -> Any:
        """Return these samples, all of them by default, in one batch; they are never changed."""
        places = self.position if chosen is None else self.position[chosen]
        return joined([self.samples[place] for place in places.tolist()])


class Experts:
    """N experts in memory, of one architecture.

    Where class counts differ, heads are padded with zeros to the largest, and so are statistics that are given and the
    shared initialisation; the coded models then have as many outputs. Statistics that are not given are computed from
    the calibration data when a method asks for them.

    Args:
        networks: The experts.
        fishers: Every expert's Fisher diagonal; or several by their data, ``own`` and ``pooled``.
        grams: Every expert's Gram matrices, likewise.
        initial: The shared initialisation, for methods and policies that want it.
        calibration: For every expert the samples of its own task: a `coin.data.Calibration`, or batches ``[B, …]``,
            read once; of pairs (inputs, labels) the inputs.
        forward: (network, batch) → logits ``[B, C]``, where networks are not called with one tensor: batches may then
            be mappings of tensors too. What a method makes is called with batches as well; what `merge_networks`
            returns is not.

    Attributes:
        passes: Forward-equivalents spent so far on what was asked for: what a merge has cost.
        seconds: Wall time that statistics took elsewhere.
        train: A `coin.modules.training.Training` for methods that are trained; without one they train in memory.

    Raises ConfigurationError where there are no experts, or parts are of different numbers of them; DataError where
    there is no calibration batch, or one holds anything but tensors of as many samples; HeadError where class counts
    differ, and the heads cannot be padded.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        fishers: Given | None = None,
        grams: Given | None = None,
        initial: nn.Module | None = None,
        calibration: Sequence[Iterable[Any]] | None = None,
        forward: Forward | None = None,
    ) -> None:
        self.passes = self.seconds = 0.0
        self.train: Any = None
        if not networks:
            raise ConfigurationError("found no experts, expected at least one")
        own = [adapted(network, forward) for network in networks]
        self.networks: Sequence[nn.Module] = of_one_width(own)
        padded = [pair for pair in zip(self.networks, own, strict=True) if pair[0] is not pair[1]]
        self._own, self._is_padded = own, bool(padded)
        self._given = {StatisticKind.fisher: fishers, StatisticKind.gram: grams}
        for name, given in self._given.items():
            for states in given.values() if isinstance(given, Mapping) else [given]:
                self._check_count(states, f"{name} statistics")
        self._initial = initial
        self._computed: dict[Statistic, Sequence[State]] = {}
        self._outputs: dict[tuple[int, bool, bool], list[Run]] = {}
        self._calibration: Sequence[Iterable[Batch]] | None = None
        if calibration is not None:
            self._check_count(calibration, "tasks' calibration inputs")
            self._calibration = calibration
        if calibration is not None and not all(type(each) is Calibration for each in calibration):
            self._calibration = [[checked(batch, self.networks[0]) for batch in batches] for batches in calibration]
            if not any(self._calibration):
                raise DataError("found no calibration batches, expected at least one; give those of every task")
            for sample in islice(chain.from_iterable(map(samples_of, chain.from_iterable(self._calibration))), 1):
                for network, before in padded:
                    _check_padding(network, before, sample)

    def _check_count(self, parts: Sequence[Any] | None, what: str) -> None:
        if parts is not None and len(parts) != len(self.networks):
            raise ConfigurationError(
                f"found {what} of {len(parts)} experts, expected {len(self.networks)}; give those of every expert"
            )

    @property
    def count(self) -> int:
        """N."""
        return len(self.networks)

    @property
    def parameters(self) -> Sequence[State]:
        """Every expert's parameters, same names and shapes."""
        return [parameters_of(network) for network in self.networks]

    @property
    def buffers(self) -> Sequence[State]:
        """Every expert's buffers."""
        return [dict(network.named_buffers()) for network in self.networks]

    @property
    def has_batchnorm(self) -> bool:
        """Whether the networks have BatchNorm layers with running statistics."""
        return has_batchnorm(self.networks[0])

    @property
    def is_calibrated(self) -> bool:
        """Whether there are calibration samples."""
        return self._calibration is not None

    def each_network(self) -> Iterator[nn.Module]:
        """Yield the experts, one at a time where memory counts."""
        yield from self.networks

    def blank(self) -> nn.Module:
        """Return a new network of the experts' architecture, whose contents do not matter."""
        return clone(self.networks[0])

    def initial(self) -> tuple[State, State]:
        """Return the shared initialisation's parameters and buffers; raises ConfigurationError where there is none."""
        if self._initial is None:
            raise ConfigurationError(
                "found no shared initialisation, which the method or its BatchNorm policy 'keep' needs; give it as "
                "initial, or choose another"
            )
        initial = widened(self._initial, self._head_and_width()[1]) if self._is_padded else self._initial
        return parameters_of(initial), dict(initial.named_buffers())

    def available(self, name: StatisticKind, data: DataChoice) -> list[DataChoice]:
        """Return on which data a statistic can be had, of what a method's option allows."""
        given = self._given[name]
        if isinstance(given, Mapping):
            allowed = [DataChoice(each) for each in given if data in (DataChoice.auto, each)]
            if not allowed:
                raise ConfigurationError(f"found {name} statistics of {', '.join(given)} data, expected {data}")
            return allowed
        return data.alternatives if given is None or data is not DataChoice.auto else [DataChoice.own]

    def statistic(self, which: Statistic) -> Sequence[State]:
        """Return one statistic of every expert; ConfigurationError if it is not given, nor calibration data for it."""
        given = self._given[which.name]
        if given is None:
            if which not in self._computed:
                self._computed[which] = self.computed(which.kind, self.samples(which.data))
            states = self._computed[which]
        else:
            states = given[which.data] if isinstance(given, Mapping) else given
        if not self._is_padded:
            return states
        return [padded_statistic(state, *self._head_and_width(), which.kind) for state in states]

    def computed(self, kind: FisherKind | None, samples: Sequence[Iterable[Batch]]) -> list[State]:
        """Return every expert's Fisher of a kind, or none for its Gram matrices, on its samples; count the passes.

        Fishers are of the experts as they are given: a class that a head is padded with has a probability too.
        """
        if kind is FisherKind.empirical:
            raise ConfigurationError("found no labels for the empirical Fisher; compute it and give it as fishers")
        sums, shared = [], set(self.parameters[0])
        networks = self.each_network() if kind is None else self._own
        for network, batches in zip(networks, samples, strict=True):
            shared &= trainable(network).keys()  # what is frozen in one expert is averaged
            if kind is None:
                sums.append(gram_sums(network, batches))
            else:
                generator = process_generator(kind, seed=0, rank=0)
                sums.append(fisher_sums(network, batches, kind=kind, generator=generator))
        self.passes += sum(each.passes for each in sums)
        return [
            {name: value for name, value in each.mean().items() if name.removesuffix(TRANSPOSED) in shared}
            for each in sums
        ]

    def samples(self, data: DataChoice) -> Sequence[Iterable[Batch]]:
        """Return for every expert the batches that its statistics are of: its own task's, or all tasks'."""
        if data is DataChoice.pooled:
            return [self.pooled] * self.count
        if self._calibration is None:
            raise ConfigurationError(
                "found no calibration inputs, which the merge needs; give them as calibration, or name the tasks"
            )
        return self._calibration

    def fitted(self, data: DataChoice) -> Sequence[Calibration]:
        """Return what `samples` does, without the samples that are held out."""
        fitted = self.split[0]
        if data is DataChoice.pooled:
            return [fitted] * self.count
        tasks = self.tasks[: fitted.num_samples]
        return [fitted.subset((tasks == task).nonzero().flatten()) for task in range(self.count)]

    @cached_property
    def pooled(self) -> Calibration:
        """All tasks' calibration samples, evenly interleaved."""
        own: Any = self.samples(DataChoice.own)
        return pooled(own) if isinstance(own[0], Calibration) else MemoryCalibration.of_tasks(own)

    @cached_property
    def tasks(self) -> Tensor:
        """Which task each pooled sample is from, int64 ``[P]``."""
        parts = [len(each.parts) if isinstance(each, Calibration) else 1 for each in self.samples(DataChoice.own)]
        return torch.arange(self.count).repeat_interleave(torch.tensor(parts))[self.pooled.part]

    @cached_property
    def split(self) -> tuple[Calibration, Calibration]:
        """The pooled samples to fit on, and the last fifth of them, on which choices are made."""
        samples = self.pooled.num_samples
        border = samples - held_out_count(samples)
        return self.pooled.subset(range(border)), self.pooled.subset(range(border, samples))

    def target(self, row: Sequence[float], *, held_out: bool = False) -> Tensor:
        """Return Σ_i β_i f_i on the pooled samples ``[P, C]``, without the held-out ones if `held_out`.

        Raises StateError where an output is not finite.
        """
        logits = torch.cat([self._logits(part) for part in ([0] if held_out else [0, 1])], dim=1)
        return torch.tensordot(logits.new_tensor(row), logits, dims=1)  # type: ignore[no-any-return]

    def run(self, network: nn.Module, batches: Iterable[Batch]) -> Tensor:
        """Return a network's logits ``[P, C]`` in eval mode, and count the passes."""
        return self.run_whole(network, batches).logits

    def run_whole(
        self, network: nn.Module, batches: Iterable[Batch], features: bool = False, stages: bool = False
    ) -> Run:
        """Return the same with features, if they are asked for, as `coin.networks.stages.run_network`."""
        with evaluating(network, gradients=False):
            inputs = (as_input(batch, network) for batch in batches)
            if features:
                runs = [run_network(network, each, features, stages) for each in inputs]
            else:
                runs = [Run(logits[:, :0], logits) for logits in map(network, inputs)]
        self.passes += sum(len(run.logits) for run in runs)
        return Run(torch.cat([run.features for run in runs]), torch.cat([run.logits for run in runs]), runs[0].widths)

    def runs(self, part: int, features: bool = False, stages: bool = False) -> list[Run]:
        """Return what all experts answer to a part of `split`; they run once."""
        asked = (part, features, stages)
        if asked not in self._outputs:
            found = [self.run_whole(each, self.split[part], features, stages) for each in self.each_network()]
            for index, run in enumerate(found):
                check_finite({"logits": run.logits}, f"the calibration output of expert {index}")
            self._outputs[asked] = found
        return self._outputs[asked]

    @cached_property
    def heads(self) -> list[tuple[Tensor, Tensor]]:
        """All experts' heads, checked on a few samples to give their logits; see `coin.networks.heads.linear_heads`."""
        few = take(next(iter(self.split[1])), slice(0, 8))
        found = []
        for network in self.each_network():
            with evaluating(network, gradients=False):
                found += linear_heads([network], as_input(few, network))
        self.passes += self.count * size_of(few)
        return found

    def _logits(self, part: int) -> Tensor:
        """Return all experts' logits on a part of `split` ``[N, ·, C]``, of whichever runs there are."""
        found = next((runs for (own, *_), runs in self._outputs.items() if own == part), None)
        return torch.stack([run.logits for run in found or self.runs(part)])

    def _head_and_width(self) -> tuple[str, int]:
        """Return the head's name, and its number of outputs after padding."""
        head = head_name(self.networks[0])
        return head, len(self.networks[0].get_submodule(head).get_parameter("weight"))


def padded_statistic(state: State, head: str, width: int, kind: FisherKind | None) -> State:
    """Return an expert's statistic with its head padded like the expert's, whose added logits are zero.

    The exact Fisher of a linear head is the same for every output, since each logit is its own row times the features:
    the padded rows get it too. The other kinds weigh outputs by probabilities, of which those have none: zero. Gram
    matrices (no kind) are of inputs, and stay as they are.
    """
    if kind is None:
        return state
    own = state.keys() & {f"{head}.weight".lstrip("."), f"{head}.bias".lstrip(".")}
    fill = {name: state[name].mean(0) for name in own} if kind in (FisherKind.exact, FisherKind.monte_carlo) else None
    rows = padded_rows(state, head, width, fill=fill)
    # A ChainMap that is never written to takes any mapping; the other tensors are not read.
    return ChainMap(rows, cast(Any, state)) if rows else state


def _check_padding(padded: nn.Module, own: nn.Module, sample: Batch) -> None:
    """Raise HeadError where a padded network's answer is not the network's own with zeros behind it."""
    with evaluating(own, gradients=False), evaluating(padded, gradients=False):
        found, expected = (network(as_input(sample, network)) for network in (padded, own))
    spare = found.shape[1] - expected.shape[1]
    if spare < 1 or not torch.allclose(found, pad_logits(expected, found.shape[1]), rtol=1e-2, atol=1e-4):
        raise HeadError(
            f"the logits of {type(own).__name__} are not those of its head '{head_name(own)}', which is padded since "
            "class counts differ; name the layer that gives them in an attribute 'head_name', or give experts of one "
            "class count"
        )


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters by name, detached."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def held_out_count(samples: int) -> int:
    """Return how many of so many samples are held out: a fifth, at least one; ConfigurationError for fewer than two."""
    if samples < 2:
        raise ConfigurationError(
            f"found {samples} pooled calibration samples, expected at least 2: one fits, one is held out; raise the "
            "number of samples"
        )
    return max(1, round(HELD_OUT * samples))
