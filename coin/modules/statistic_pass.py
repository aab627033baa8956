"""A pass over calibration data as a Lightning prediction run, so that it uses any number of devices."""

import time

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from coin.statistics import FisherKind, Sums, fisher_sums, reduce_sums


class FisherPass(LightningModule):
    """Sums a network's Fisher diagonal over the batches of a predict loader, then over all processes.

    After ``trainer.predict`` the result is in `sums`, the same on every process, and the wall time in `seconds`.

    Args:
        network: The network.
        kind: Which Fisher diagonal.
        cotangents: k, for the Monte Carlo kind.
        seed: Of Monte Carlo's random cotangents.
        labels: The true classes of the samples ``[P]`` in order, for the empirical kind.
    """

    def __init__(
        self,
        network: nn.Module,
        kind: FisherKind = FisherKind.exact,
        cotangents: int | None = None,
        seed: int = 0,
        labels: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.kind = kind
        self.cotangents = cotangents
        self.seed = seed
        self.labels = labels
        self.sums: Sums | None = None
        self.seconds = 0.0
        self._started = 0.0

    def on_predict_start(self) -> None:
        """Start the clock, the random stream and the sums."""
        self._started = time.perf_counter()
        self.sums = None
        self._generator = torch.Generator(self.device).manual_seed(self.seed * 100_003 + self.global_rank)
        self._mine = None if self.labels is None else self.labels[self.global_rank :: self.trainer.world_size]

    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add the batch's sums."""
        done = 0 if self.sums is None else self.sums.count
        sums = fisher_sums(
            self.network,
            [batch],
            kind=self.kind,
            cotangents=self.cotangents,
            generator=self._generator if self.kind is FisherKind.monte_carlo else None,
            labels=None if self._mine is None else self._mine[done : done + len(batch)].to(self.device),
        )
        self.sums = sums if self.sums is None else self.sums + sums

    def on_predict_end(self) -> None:
        """Add up the processes' sums."""
        if self.sums is None:
            zeros = {name: torch.zeros_like(p) for name, p in self.network.named_parameters() if p.requires_grad}
            self.sums = Sums(zeros, 0, 0.0)
        self.sums = reduce_sums(self.sums)
        self.seconds = time.perf_counter() - self._started
