"""Leaves a SLURM job that is about to end, so that it goes on in the same place when it is started again."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from coin.processes import any_process

STATUS = 75
"""The exit status of a process that has queued its job again: ``EX_TEMPFAIL`` of ``sysexits.h``."""


class Requeue(Callback):
    """Queues the job again when SLURM signals its end (``#SBATCH --signal=SIGUSR1@90``), and exits with `STATUS`.

    While a network is trained that has checkpoints, the processes agree on the next whole step, write
    ``requeue-JOB.ckpt`` into the trainer's ``default_root_dir``, and leave; `resume_path` finds the file in the same
    job's next start, and it is removed when the training is finished. At any other time they leave at once, since
    whatever they are doing is done again or was written already.

    It takes the place of Lightning's own handler, which saves wherever the signal meets each process: one may then
    wait for another in the middle of a step, and the file be of half a step.

    Args:
        number: The signal.
    """

    def __init__(self, number: int = signal.SIGUSR1) -> None:
        self.number = number
        self.asked = False
        self._training = False

    @classmethod
    def of(cls, trainer: Trainer) -> "Requeue | None":
        """Return a listening callback where the trainer runs in a SLURM job that may be queued again, else None."""
        environment = trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return None
        requeue = cls(environment.requeue_signal or signal.SIGUSR1)
        if threading.current_thread() is threading.main_thread():
            signal.signal(requeue.number, requeue._on_signal)  # Lightning leaves the handler of another alone
        return requeue

    def resume_path(self, trainer: Trainer, otherwise: str | Path | None) -> str | Path | None:
        """Return the checkpoint that a training goes on from: this job's own, unless the file `otherwise` is newer."""
        own = _checkpoint(trainer)
        if not own.is_file():
            return otherwise
        other = None if otherwise is None else Path(otherwise)
        newer = other is not None and other.is_file() and other.stat().st_mtime > own.stat().st_mtime
        return otherwise if newer else own

    def leave_if_asked(self, trainer: Trainer) -> None:
        """Leave on all processes if any of them has had the signal since the last whole step."""
        if any_process(self.asked):
            _leave(trainer.is_global_zero)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take signals down from here on, where the training can go on from a checkpoint."""
        self._training = bool(trainer.checkpoint_callbacks)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save and leave if any process has had the signal; after an epoch's last step its checkpoint comes first."""
        if self._training and not trainer.is_last_batch and any_process(self.asked):
            trainer.save_checkpoint(_checkpoint(trainer))
            _leave(trainer.is_global_zero)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave at once from here on."""
        self._training = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what a finished training does not go on from."""
        if trainer.is_global_zero and trainer.checkpoint_callbacks:
            for stale in Path(trainer.default_root_dir).glob("requeue-*.ckpt"):
                stale.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self._training:
            _leave(os.environ.get("SLURM_PROCID", "0") == "0")


def _checkpoint(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / f"requeue-{_job()}.ckpt"


def _job() -> str:
    """Return the job's number, which it keeps when it is queued again."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def _leave(first: bool) -> None:
    if first:
        subprocess.run(["scontrol", "requeue", _job()], check=False)
    sys.exit(STATUS)
