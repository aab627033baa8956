"""A Trainer's progress bar."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar


class RunProgress(RichProgressBar):
    """Lightning's bar on standard error, since results belong on standard output, and gone when the run is done."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=4, console_kwargs={"stderr": True})

    def _init_progress(self, trainer: Trainer) -> None:
        super()._init_progress(trainer)
        if self.progress is not None:
            self.progress.live.transient = True
