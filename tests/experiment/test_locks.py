"""One command at a time in a folder, and no lock that outlives its holder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import coin.experiment.locks
from coin.cli import main
from coin.errors import CoinWarning, ConfigurationError, FileError
from coin.experiment.locks import LOCK, alone_in, handed_on, locked

HOLD = """
import pathlib, sys, time
from coin.experiment.locks import alone_in
with alone_in(pathlib.Path(sys.argv[1])):"""


def holder(folder: Path, then: str = "time.sleep(60)", **options: object) -> "subprocess.Popen[str]":
    """Start a process that holds a folder, says so and goes on with `then`."""
    code = f"{HOLD}\n    print('held', flush=True)\n    {then}"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_command_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        told = rf"at work in .*\(process {process.pid} on .*\), expected none"
        with pytest.raises(ConfigurationError, match=told), alone_in(tmp_path):
            raise AssertionError("held twice")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with alone_in(tmp_path):
        pass


def test_a_child_shares_the_lock_and_keeps_it_when_its_parent_is_killed(tmp_path: Path) -> None:
    with alone_in(tmp_path) as lock:
        variables, descriptors = handed_on(lock)
        child = holder(tmp_path, env={**os.environ, **variables}, pass_fds=descriptors)
    try:
        # This process has let go; the child, which was handed the lock, has not.
        with locked(tmp_path / LOCK) as lock:
            assert lock is None
    finally:
        child.kill()
        child.wait()
    with locked(tmp_path / LOCK) as lock:
        assert lock is not None


def test_a_lock_of_another_folder_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = holder(tmp_path / "theirs")
    try:
        with alone_in(tmp_path / "mine") as lock:
            variables, _ = handed_on(lock)
            monkeypatch.setenv(*next(iter(variables.items())))
            with pytest.raises(ConfigurationError, match="at work"), alone_in(tmp_path / "theirs"):
                pass
            with alone_in(tmp_path / "mine"):  # handed on
                pass
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_worker_does_not_hold_what_its_killed_parent_held(tmp_path: Path) -> None:
    # The parent forks a worker that lives on, as a loader's does for seconds, and is killed.
    process = holder(tmp_path, "import os; os.fork() or time.sleep(20); time.sleep(60)", start_new_session=True)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    try:
        with locked(tmp_path / LOCK) as lock:
            assert lock is not None
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(coin.experiment.locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(coin.experiment.locks.fcntl, "flock", refuse)
    with pytest.warns(CoinWarning, match="has no locks: see to it"), alone_in(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot write .*choose a folder"), alone_in(tmp_path / "file" / "folder"):
        pass


def test_coin_run_is_refused_where_another_is_at_work(
    finished: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    process = holder(finished)
    try:
        assert main(["run", "-c", str(config), f"--output={finished.parent}", "--calibration.samples_per_task=9"]) == 2
    finally:
        process.kill()
        process.wait()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"coin: error: found another coin command at work in '{finished}'")
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != LOCK}
    assert {path: stamp for path, stamp in before.items() if path.name != LOCK} == after
