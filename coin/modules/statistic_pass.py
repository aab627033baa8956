"""A pass over calibration data as a Lightning prediction run, so that it uses any number of devices."""

import time
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from coin.errors import DataError
from coin.statistics import (
    DEFAULT_MEMORY_MIB,
    FisherKind,
    Sums,
    fisher_sums,
    gram_sums,
    process_generator,
    reduce_sums,
    shard,
)
from coin.statistics.statistic import StatisticKind


class StatisticPass(LightningModule):
    """Sums a network's statistic over the batches of a predict loader, then over all processes.

    After ``trainer.predict`` the result is in `sums`, the same on every process, and the wall time in `seconds`.

    Args:
        network: The network.
        statistic: ``fisher`` or ``gram``; the other options are for the Fisher.
        kind: Which Fisher diagonal.
        cotangents: k, for the Monte Carlo kind.
        seed: Of Monte Carlo's random cotangents.
        labels: The true classes of the samples ``[P]`` in order, for the empirical kind.
        memory_mib: Bound on the pass's working memory in MiB.
    """

    def __init__(
        self,
        network: nn.Module,
        statistic: StatisticKind = StatisticKind.fisher,
        kind: FisherKind = FisherKind.exact,
        cotangents: int | None = None,
        seed: int = 0,
        labels: Tensor | None = None,
        memory_mib: int = DEFAULT_MEMORY_MIB,
    ) -> None:
        super().__init__()
        self.network = network
        self.statistic = statistic
        self.options: dict[str, Any] = {"kind": kind, "cotangents": cotangents, "memory_mib": memory_mib}
        self.seed = seed
        self.labels = labels
        self.sums: Sums | None = None
        self.seconds = 0.0
        self._started = 0.0

    def on_predict_start(self) -> None:
        """Start the clock, the random stream and the sums."""
        self._started = time.perf_counter()
        self.sums = None
        self._generator = process_generator(self.options["kind"], self.seed, self.global_rank, self.device)
        self._mine = None
        if self.labels is not None:
            self._mine = self.labels[list(shard(len(self.labels), self.global_rank, self.trainer.world_size))]

    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add the batch's sums."""
        if self.statistic is StatisticKind.gram:
            sums = gram_sums(self.network, [batch])
        else:
            done = 0 if self.sums is None else self.sums.count
            labels = None if self._mine is None else self._mine[done : done + len(batch)].to(self.device)
            sums = fisher_sums(self.network, [batch], generator=self._generator, labels=labels, **self.options)
        self.sums = sums if self.sums is None else self.sums + sums

    def on_predict_end(self) -> None:
        """Add up the processes' sums.

        Raises:
            DataError: This process had no samples, and so has no sums to add.
        """
        if self.sums is None:
            raise DataError(
                f"found no calibration samples on process {self.global_rank} of {self.trainer.world_size}, expected at "
                "least one; raise the number of samples or take fewer devices"
            )
        self.sums = reduce_sums(self.sums)
        self.seconds = time.perf_counter() - self._started
