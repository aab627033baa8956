"""A Trainer's progress bar: one for a whole run, with the time that is left, quiet where nobody watches."""

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from coin.progress import Bar, progress


class RunProgress(ProgressBar):
    """Tells `coin.progress` how far a Trainer has come, on its first process.

    Lightning's own bars start anew in every epoch and write to standard output, where results belong.
    """

    def __init__(self) -> None:
        super().__init__()
        self._open = ExitStack()
        self._bar = Bar()

    def disable(self) -> None:
        """Do nothing: what other processes do is not told anyway."""

    def enable(self) -> None:
        """Do nothing: there is a display or there is none."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar over all optimiser steps; a resumed training starts where it was."""
        total = trainer.estimated_stepping_batches
        self._begin(trainer, "training", None if total == float("inf") else total, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on, and show what the module wants to be shown."""
        numbers = [f"{name} {value:.3g}" for name, value in trainer.progress_bar_metrics.items()]
        epoch = [f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"] if (trainer.max_epochs or -1) > 0 else []
        self._bar.reach(trainer.global_step, ", ".join([*epoch, *numbers]))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar over all batches, unless this is a training's own validation."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._begin(trainer, "validating", _total(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Move on."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._bar.advance()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar over all batches of all loaders."""
        self._begin(trainer, "evaluating", _total(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Move on."""
        self._bar.advance()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar over all batches."""
        self._begin(trainer, "calibration samples", _total(trainer.num_predict_batches))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Move on."""
        self._bar.advance()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar."""
        self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._open.close()

    def _begin(self, trainer: Trainer, what: str, total: float | None, done: int = 0) -> None:
        self._open.close()
        self._bar = self._open.enter_context(progress(what, total, done)) if trainer.is_global_zero else Bar()


def _total(batches: Any) -> float | None:
    """Return the number of batches of one or of several loaders; none where one has no end."""
    total = sum(batches) if isinstance(batches, list) else batches
    return None if total == float("inf") else float(total)
