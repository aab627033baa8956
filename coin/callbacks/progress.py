"""A Trainer's progress."""

from typing import Any

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from coin.core.progress import progress_bar


class RunProgress(RichProgressBar):
    """Lightning's bar on standard error, and gone when the run is done: results belong on standard output."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=4, console_kwargs={"stderr": True})

    def _init_progress(self, trainer: Trainer) -> None:
        super()._init_progress(trainer)
        if self.progress is not None:
            self.progress.live.transient = True

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar, and give rich's console, for Lightning's results, back to standard output."""
        super().on_test_end(trainer, pl_module)
        self._give_back()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar and restore standard output, unless the validation is part of a training."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._give_back()

    def _give_back(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
            rich.reconfigure()


class LoggedProgress(Callback):
    """A line on standard error now and then, for trainings without a terminal."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count the steps that are left."""
        self._step = trainer.global_step
        self._bar = progress_bar("training", trainer.estimated_stepping_batches - self._step)

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Count a step of the optimizer, if this was one."""
        if steps := trainer.global_step - self._step:
            self._step += steps
            self._bar.update(steps)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting."""
        self._bar.close()
