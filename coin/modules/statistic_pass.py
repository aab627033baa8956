"""A pass over calibration data as a Lightning prediction run, on any number of devices."""

import time

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from coin.errors import DataError
from coin.statistics import FisherPass, Sums, reduce_sums
from coin.statistics.gram import GramPass
from coin.statistics.statistic import StatisticOptions


class StatisticPass(LightningModule):
    """Sums a network's statistic over the batches of a predict loader, then over all processes.

    After ``trainer.predict`` the result is in `sums`, the same on every process, and the wall time in `seconds`.

    Args:
        network: The network.
        options: Which statistic.
        seed: The seed of Monte Carlo's random cotangents.
        labels: The true classes of the samples ``[P]`` in order, for the empirical kind.
    """

    def __init__(
        self, network: nn.Module, options: StatisticOptions, seed: int = 0, labels: Tensor | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.options = options
        self.seed = seed
        self.labels = labels
        self.sums: Sums | None = None
        self.seconds = 0.0
        self._started = 0.0
        self._pass: FisherPass | GramPass | None = None

    def on_predict_start(self) -> None:
        """Start the clock, the random stream and the sums."""
        self._started, self.sums = time.perf_counter(), None
        self._pass = self.options.begin(
            self.network,
            self.labels,
            seed=self.seed,
            rank=self.global_rank,
            world=self.trainer.world_size,
            device=self.device,
        )

    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add the batch's sums."""
        assert self._pass is not None
        self._pass.add(batch)

    def on_predict_end(self) -> None:
        """Add up the sums of all processes; raises DataError if this process had no samples."""
        done, self._pass = self._pass, None
        if done is None or done.count == 0:
            raise DataError(
                f"found no calibration samples on process {self.global_rank} of {self.trainer.world_size}, expected at "
                "least one; raise the number of samples or take fewer devices"
            )
        self.sums = reduce_sums(done.sums())
        self.seconds = time.perf_counter() - self._started
