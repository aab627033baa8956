"""One point of a sweep: its folder, its process, and the lock that the process holds."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from coin.experiment.children import child_environment
from coin.experiment.experiment import Experiment
from coin.experiment.locks import LOCK, handed_on, locked
from coin.experiment.records import Steps, step_key
from coin.reporting.results import RESULTS_CSV
from coin.reporting.wandb_logging import TAG_LENGTH
from coin.reporting.wandb_settings import user_tags
from coin.steps.code import AUTO
from coin.sweeps.points import SweepPoint
from coin.sweeps.sharing import Shelf, shared_steps


class PointRun:
    """One point's process and folder.

    Args:
        point: The point.
        folder: The experiment's folder.
        experiment: The experiment, as ``coin run`` would make it.
    """

    def __init__(self, point: SweepPoint, folder: Path, experiment: Experiment) -> None:
        self.point = point
        self.folder = folder
        self.log = folder / "sweep.log"
        self.shelf = Shelf(folder, shared_steps(experiment))
        self.seed_folders = [folder / f"seed-{seed}" for seed in experiment.seeds]
        parts = ("network", "base", "tasks", "expert", "calibration", "methods", "decoders", "seeds", "trainer")
        options: dict[str, Any] = {name: getattr(experiment, name) for name in parts}
        brought = [*experiment.expert.checkpoints.values(), experiment.base and experiment.base.checkpoint]
        files = [Path(path) for path in brought if path and Path(path).is_file()]
        code = AUTO if experiment.code is None else experiment.code.matrix
        self.key = step_key({**options, "code": code}, files)
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0

    @property
    def finished(self) -> bool:
        """Whether the point has been run to its end with these options, and its results stand."""
        return Steps(self.folder).finished("sweep", self.key, self._results)

    @property
    def _results(self) -> list[Path]:
        return [folder / RESULTS_CSV for folder in self.seed_folders]

    @property
    def held(self) -> bool:
        """Whether a process of an earlier, killed sweep is still at work on this point."""
        if not (self.folder / LOCK).exists():
            return False
        with locked(self.folder / LOCK) as lock:
            return lock is None

    def start(self, threads: int) -> bool:
        """Take over what other points have done alike, and start ``coin run``.

        Returns:
            Whether it was started: not where another process has come first.
        """
        command = [sys.executable, "-m", "coin", "run", *self.point.arguments]
        tags = ",".join([*user_tags(), f"sweep-{self.folder.parent.name}"[:TAG_LENGTH]])
        with locked(self.folder / LOCK) as lock, self.log.open("a", encoding="utf-8") as log:
            if lock is None:
                return False
            taken = self.shelf.open()
            # The process inherits the lock and holds it as long as it lives, whatever becomes of this one.
            variables, descriptors = handed_on(lock)
            print(*(f"# {line}" for line in taken), f"# {' '.join(command)}", sep="\n", file=log, flush=True)
            self.started = time.monotonic()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**child_environment(threads), **variables, "WANDB_TAGS": tags},
                pass_fds=descriptors,
            )
        return True

    def finish(self) -> None:
        """Record that the point has been run to its end."""
        Steps(self.folder).finish("sweep", self.key, self._results)
