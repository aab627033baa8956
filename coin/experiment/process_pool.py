"""``coin`` commands as processes of this machine, several at a time, which end when the process that started them does."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TypeVar

_POLL_SECONDS = 0.1
_STOP_SECONDS = 10.0


class Command:
    """A ``coin`` command that is run in a process of its own.

    Args:
        name: What it does, for a person.
        arguments: The arguments of ``coin``.
        log: The file that gets what it prints, behind what is there.
    """

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
        """Return the last line in the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


C = TypeVar("C", bound=Command)


def child_environment(threads: int) -> dict[str, str]:
    """Return this process's environment for a child with so many threads, unless ``OMP_NUM_THREADS`` is set."""
    # W&B's service belongs to the process that started it: a child that inherits its address may find it gone.
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {"OMP_NUM_THREADS": str(threads), **inherited}


def run_side_by_side(
    commands: Sequence[C],
    environments: Sequence[Mapping[str, str]],
    say: Callable[[str], None],
    on_success: Callable[[C], None] = lambda _: None,
) -> list[C]:
    """Run commands in their order, and wait for all of them; one that fails stops none of the others.

    Args:
        commands: The commands.
        environments: An environment for each process at a time; a command gets one that no other has meanwhile.
        say: Is told of every start and end.
        on_success: Is given every command that has ended well.

    Returns:
        The commands that failed.
    """
    waiting, failed = list(commands), []
    running: dict[int, tuple[C, subprocess.Popen[bytes], float]] = {}
    with _sigterm_as_exit():
        try:
            while waiting or running:
                for place, environment in enumerate(environments):
                    if place in running and (status := running[place][1].poll()) is not None:
                        command, _, started = running.pop(place)
                        if status == 0:
                            on_success(command)
                            ended = f"{len(commands) - len(waiting) - len(running)} of {len(commands)}"
                            say(f"{command.name}: finished in {time.monotonic() - started:.0f} s ({ended})")
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
    return failed


def _stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End processes, by force those that do not end within seconds."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM, which a scheduler sends before the end of an allocation, end the children as well."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
