"""A ``coin`` command to be run by another process, on this machine or in a cluster."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coin.core.processes import cores
from coin.errors import CoinError
from coin.pipeline.layout import LAUNCH_YAML
from coin.pipeline.step import Step


class CommandFailedError(CoinError):
    """Some commands have failed; all others have finished."""


@dataclass(eq=False)
class Command:
    """A ``coin`` command as a subprocess, or as a callable for submitit and Ray; its output is appended to `log`.

    `name` says what it does, for a person; `variables` are environment variables beside those of this process.
    """

    name: str
    arguments: Sequence[str]
    log: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    def start(self, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """Start the process."""
        command = [sys.executable, "-m", "coin", *self.arguments]
        self.note(f"# {' '.join(command)}")
        with self.log.open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**environment, **self.variables}
            )

    def note(self, line: str) -> None:
        """Append a line to the log, as where a process could not say itself what has become of it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            print(line, file=log)

    def last_line(self) -> str:
        """Return the last line that the process printed."""
        if not self.log.is_file():
            return "it has printed nothing"
        return self.log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]

    def __call__(self) -> None:
        """Run it within a job or task of a cluster."""
        if self.start(child_environment(cores())).wait() != 0:
            raise CommandFailedError(f"{self.name}: {self.last_line()}")

    def checkpoint(self) -> Any:
        """Return the job to requeue when the cluster preempts this one: the same job, which resumes."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def step_command(step: Step) -> Command:
    """Return the command that runs a step of one seed."""
    log = (step.training or step.folder / "logs" / step.name) / "launch.log"
    arguments = ("run", "-c", str(step.folder / LAUNCH_YAML), "--only", step.name)
    return Command(f"{step.of_seed}{step.what}", arguments, log)


def child_environment(threads: int) -> dict[str, str]:
    """Return a subprocess's environment with this number of threads, unless ``OMP_NUM_THREADS`` is set."""
    # W&B's service belongs to the process that started it: a child that inherits its address may find it gone.
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {"OMP_NUM_THREADS": str(threads), **inherited}
