"""Experts whose calibration samples are stored images or texts, which become inputs a batch at a time."""

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from coin.data import Calibration, pooled
from coin.merging.experts import HELD_OUT, Experts
from coin.statistics.statistic import DataChoice


class CalibratedExperts(Experts):
    """Experts with each task's `coin.data.Calibration`, in their order; none for what runs no networks."""

    _calibration: Sequence[Calibration] | None

    def __init__(self, networks: Sequence[nn.Module], calibrations: Sequence[Calibration] | None) -> None:
        super().__init__(networks)
        self._calibration = calibrations

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
        return pooled(cast("Sequence[Calibration]", self.samples(DataChoice.own)))

    @cached_property
    def tasks(self) -> Tensor:
        """Which task each pooled sample is from, int64 ``[P]``."""
        parts = [len(each.parts) for each in cast("Sequence[Calibration]", self.samples(DataChoice.own))]
        return torch.arange(self.count).repeat_interleave(torch.tensor(parts))[self.pooled.part]

    @cached_property
    def split(self) -> tuple[Calibration, Calibration]:
        """The pooled samples to fit on, and the last fifth of them, on which choices are made."""
        return self.pooled.split(HELD_OUT)
