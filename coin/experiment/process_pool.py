"""``coin`` commands as processes of this machine, several at a time; they end when the process that runs them does."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from coin.errors import CoinError
from coin.processes import say

_POLL_SECONDS = 0.1
_STOP_SECONDS = 10.0


class CommandFailedError(CoinError):
    """Commands have failed; the others are finished."""


class Command:
    """A ``coin`` command that is run in a process of its own, which appends what it prints to `log`."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self.arguments = arguments
        self.log = log

    def start(self, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """Start the process."""
        command = [sys.executable, "-m", "coin", *self.arguments]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            print(f"# {' '.join(command)}", file=log, flush=True)
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def last_line(self) -> str:
        """Return what the process has printed last, nothing where it has not begun."""
        if not self.log.is_file():
            return "it has printed nothing"
        return self.log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]


C = TypeVar("C", bound=Command)


def child_environment(threads: int) -> dict[str, str]:
    """Return the environment of a child with so many threads, unless ``OMP_NUM_THREADS`` is set."""
    # W&B's service belongs to the process that started it: a child that inherits its address may find it gone.
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {"OMP_NUM_THREADS": str(threads), **inherited}


def run_side_by_side(
    commands: Sequence[C],
    environments: Sequence[Mapping[str, str]],
    on_success: Callable[[C], None] = lambda _: None,
) -> list[C]:
    """Run commands in their order, wait for all of them, and return those that failed.

    Args:
        commands: The commands.
        environments: One for each process at a time; a command gets one that no other has meanwhile.
        on_success: Is given every command that has ended well.
    """
    waiting, failed = list(commands), []
    running: dict[int, tuple[C, subprocess.Popen[bytes], float]] = {}
    # A scheduler sends SIGTERM before the end of an allocation. Python lets the main thread alone listen to it.
    listens = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number)) if listens else None
    try:
        while waiting or running:
            for place, environment in enumerate(environments):
                if place in running and (status := running[place][1].poll()) is not None:
                    command, _, started = running.pop(place)
                    if status == 0:
                        on_success(command)
                        ended = len(commands) - len(waiting) - len(running)
                        seconds = time.monotonic() - started
                        say(f"{command.name}: finished in {seconds:.0f} s ({ended} of {len(commands)})")
                    else:
                        failed.append(command)
                        say(f"{command.name}: failed with exit status {status}: {command.last_line()}")
                if waiting and place not in running:
                    command = waiting.pop(0)
                    running[place] = command, command.start(environment), time.monotonic()
                    say(f"{command.name}: started")
            time.sleep(_POLL_SECONDS)
    finally:
        _stop([process for _, process, _ in running.values()])
        if listens:
            signal.signal(signal.SIGTERM, before)
    return failed


def raise_for(failed: Sequence[Command], count: int, what: str) -> None:
    """Raise a `CommandFailedError` if any of so many commands has failed."""
    if failed:
        raise CommandFailedError(
            f"{len(failed)} of {count} {what} failed, the first of them {failed[0].name}: {failed[0].last_line()} "
            f"(see {failed[0].log}); mend the cause and run the same command again"
        )


def _stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End processes, by force those that do not end within seconds."""
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        process.kill()  # does nothing to one that has ended
        process.wait()
