"""Lightning's notices, and its axes in W&B."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger

_LOGGERS = ("lightning.pytorch", "lightning.fabric")
_EXPECTED = (  # what Lightning warns of and an experiment means
    r".*does not have many workers.*",  # data live in memory: workers would only copy them
    r".*(Checkpoint|Experiment logs) directory .* exists and is not empty.*",
    r".*module\(s\) in eval mode at the start of training.*",  # distillation freezes BatchNorm on purpose
    r".*is smaller than the logging interval.*",
    r".*treespec.*is deprecated.*",  # Lightning's own
    r"predict returned None.*",  # a pass that sums needs no predictions
    r".*`tensorboardX` has been removed.*",
    r".*`srun` command is available on your system but is not used.*",  # jobs are submitted, or start it themselves
    r"It is recommended to use `self.log\('train/.*",  # the first process's share of an epoch tells how it goes
)


def silence_lightning() -> None:
    """Silence Lightning's notices on standard error, and its warnings about intended behaviour of ``coin``."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Run a block with Lightning silenced, and loggers and warnings' filters left as found."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        silence_lightning()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def plot_against_epochs(module: LightningModule, names: Sequence[str]) -> None:
    """Plot metrics in W&B against the epoch, which runs of other batch sizes share; by name, as Lightning has ``*``."""
    for logger in module.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.define_metric("epoch")
            for name in names:
                logger.experiment.define_metric(name, step_metric="epoch")


def leave_out_anonymous(logger: WandbLogger) -> None:
    """Keep Lightning's logger from giving W&B a setting that it no longer takes, and warns of."""
    logger._wandb_init.pop("anonymous", None)
