"""A pass over calibration data as a Lightning prediction run, so that it uses any number of devices."""

import time

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from coin.errors import DataError
from coin.statistics import (
    DEFAULT_MEMORY_MIB,
    FisherKind,
    FisherPass,
    Sums,
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
        self.memory_mib = memory_mib
        self.kind = kind
        self.cotangents = cotangents
        self.seed = seed
        self.labels = labels
        self.sums: Sums | None = None
        self.seconds = 0.0
        self._started = 0.0
        self._fisher: FisherPass | None = None

    def on_predict_start(self) -> None:
        """Start the clock, the random stream and the sums."""
        self._started = time.perf_counter()
        self.sums = self._fisher = None
        if self.statistic is StatisticKind.gram:
            return
        mine = None
        if self.labels is not None:
            mine = self.labels[list(shard(len(self.labels), self.global_rank, self.trainer.world_size))].to(self.device)
        self._fisher = FisherPass(
            self.network,
            kind=self.kind,
            labels=mine,
            cotangents=self.cotangents,
            generator=process_generator(self.kind, self.seed, self.global_rank, self.device),
            memory_mib=self.memory_mib,
        )

    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add the batch's sums."""
        if self._fisher is not None:
            self._fisher.add(batch)
            return
        sums = gram_sums(self.network, [batch])
        self.sums = sums if self.sums is None else self.sums + sums

    def on_predict_end(self) -> None:
        """Add up the processes' sums.

        Raises:
            DataError: This process had no samples, and so has no sums to add.
        """
        if self._fisher is not None and self._fisher.count > 0:
            self.sums = self._fisher.sums()
            self._fisher = None
        if self.sums is None:
            raise DataError(
                f"found no calibration samples on process {self.global_rank} of {self.trainer.world_size}, expected at "
                "least one; raise the number of samples or take fewer devices"
            )
        self.sums = reduce_sums(self.sums)
        self.seconds = time.perf_counter() - self._started
