"""A progress bar of a training's steps."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from coin.core.progress import progress_bar


class StepProgress(Callback):
    """A training's steps as a bar on standard error; without a terminal a line now and then."""

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

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal clean for what is printed next."""
        if hasattr(self, "_bar"):
            self._bar.close()
