"""What W&B plots a training run against: whole passes over the data, which runs of other batch sizes share."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger


def plot_against_epochs(module: LightningModule, names: Sequence[str]) -> None:
    """Have W&B plot metrics that are logged once an epoch against the epoch.

    Every name is defined by itself: W&B takes any of several patterns that fit, and Lightning's ``*``, which stands
    for the number of steps, fits all.

    Args:
        module: The module that is about to be trained.
        names: What it logs.
    """
    for logger in module.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.define_metric("epoch")
            for name in names:
                logger.experiment.define_metric(name, step_metric="epoch")
