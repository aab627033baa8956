"""A Trainer's progress bar."""

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn


class RunProgress(RichProgressBar):
    """Lightning's bar on standard error, since results belong on standard output, and gone when the run is done."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=4, console_kwargs={"stderr": True})

    def _init_progress(self, trainer: Trainer) -> None:
        super()._init_progress(trainer)
        if self.progress is not None:
            self.progress.live.transient = True

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar, and give rich's console, on which Lightning prints the results, back to standard output."""
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
