"""One point of a sweep: its folder, and its process, which holds the folder."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from coin.experiment.children import child_environment
from coin.experiment.codes import AUTO
from coin.experiment.experiment import Experiment
from coin.experiment.locks import alone_in, is_held
from coin.experiment.records import Steps, step_key
from coin.reporting.results import RESULTS_CSV
from coin.reporting.wandb_logging import TAG_LENGTH
from coin.reporting.wandb_settings import user_tags
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
        return is_held(self.folder)

    def start(self, threads: int) -> bool:
        """Take over what other points have done alike, and start ``coin run``.

        Returns:
            Whether it was started: not where another process has come first.
        """
        command = [sys.executable, "-m", "coin", "run", *self.point.arguments]
        tags = ",".join([*user_tags(), f"sweep-{self.folder.parent.name}"[:TAG_LENGTH]])
        if self.held:
            return False
        with alone_in(self.folder):
            taken = self.shelf.open()
        with self.log.open("a", encoding="utf-8") as log:
            print(*(f"# {line}" for line in taken), f"# {' '.join(command)}", sep="\n", file=log, flush=True)
            self.started = time.monotonic()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**child_environment(threads), "WANDB_TAGS": tags},
            )
        return True

    def finish(self) -> None:
        """Record that the point has been run to its end."""
        Steps(self.folder).finish("sweep", self.key, self._results)
