"""N networks with the calibration samples of their tasks, and their answers to these."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from coin.core.batches import Batch, as_input, size_of, take
from coin.data import Calibration, pooled
from coin.errors import ConfigurationError
from coin.files.tensors import check_finite
from coin.networks.heads import linear_heads
from coin.networks.stages import Run, run_network
from coin.statistics.guard import evaluating
from coin.statistics.statistic import DataChoice

HELD_OUT = 0.2
"""The share of the pooled calibration samples on which choices are made."""


class Calibrated:
    """N networks with the calibration samples of their tasks.

    Attributes:
        networks: The networks.
        count: N.
        passes: Forward-equivalents spent so far, the cost of the merge.
        seconds: Wall time of statistics that were computed elsewhere.
        train: A `coin.steps.distill.Training` for methods that train; without one they train in memory.
    """

    networks: Sequence[nn.Module]

    def __init__(self, count: int, calibration: Sequence[Iterable[Batch]] | None, train: Any = None) -> None:
        self.count, self.train, self._calibration = count, train, calibration
        self.passes = self.seconds = 0.0
        self._outputs: dict[tuple[int, bool, bool], list[Run]] = {}

    def each_network(self) -> Iterator[nn.Module]:
        """Yield the experts, one at a time to save memory if they are in files."""
        yield from self.networks

    @property
    def is_calibrated(self) -> bool:
        """Whether there are calibration samples."""
        return self._calibration is not None

    def samples(self, data: DataChoice) -> Sequence[Iterable[Batch]]:
        """Return for every expert the batches for its statistics: its own task's, or all tasks'."""
        if data is DataChoice.pooled:
            return [self.pooled] * self.count
        if self._calibration is None:
            raise ConfigurationError(
                "found no calibration inputs, which the merge needs; give them as calibration, or name the tasks"
            )
        return self._calibration

    def fitted(self, data: DataChoice) -> Sequence[Calibration]:
        """Return the same as `samples`, without the held-out samples."""
        fitted = self.split[0]
        if data is DataChoice.pooled:
            return [fitted] * self.count
        tasks = self.tasks[: fitted.num_samples]
        return [fitted.subset((tasks == task).nonzero().flatten()) for task in range(self.count)]

    @cached_property
    def pooled(self) -> Calibration:
        """All tasks' calibration samples, evenly interleaved."""
        own = self.samples(DataChoice.own)
        return pooled([each if isinstance(each, Calibration) else Calibration.of_batches([*each]) for each in own])

    @cached_property
    def tasks(self) -> Tensor:
        """Which task each pooled sample is from, int64 ``[P]``."""
        parts = [len(each.parts) if isinstance(each, Calibration) else 1 for each in self.samples(DataChoice.own)]
        return torch.arange(self.count).repeat_interleave(torch.tensor(parts))[self.pooled.part]

    @cached_property
    def split(self) -> tuple[Calibration, Calibration]:
        """The pooled samples to fit on, and the last fifth of them, on which choices are made."""
        return self.pooled.split(HELD_OUT)

    def target(self, row: Sequence[float], *, held_out: bool = False) -> Tensor:
        """Return Σ_i β_i f_i on the pooled samples ``[P, C]``, without the held-out ones if `held_out`.

        Raises StateError where an output is not finite.
        """
        found = []
        for part in [0] if held_out else [0, 1]:
            there = next((runs for (own, *_), runs in self._outputs.items() if own == part), None)
            found.append(torch.stack([run.logits for run in there or self.runs(part)]))
        logits = torch.cat(found, dim=1)
        return torch.tensordot(logits.new_tensor(row), logits, dims=1)  # type: ignore[no-any-return]

    def run(self, network: nn.Module, batches: Iterable[Batch], features: bool = False, stages: bool = False) -> Run:
        """Return a network's answers in eval mode (`coin.networks.stages.run_network`), and count the passes."""
        with evaluating(network, gradients=False):
            inputs = (as_input(batch, network) for batch in batches)
            if features:
                runs = [run_network(network, each, features, stages) for each in inputs]
            else:
                runs = [Run(logits[:, :0], logits) for logits in map(network, inputs)]
        self.passes += sum(len(run.logits) for run in runs)
        return Run(torch.cat([run.features for run in runs]), torch.cat([run.logits for run in runs]), runs[0].widths)

    def runs(self, part: int, features: bool = False, stages: bool = False) -> list[Run]:
        """Return all experts' answers to a part of `split`; they run once."""
        asked = (part, features, stages)
        if asked not in self._outputs:
            found = [self.run(each, self.split[part], features, stages) for each in self.each_network()]
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
