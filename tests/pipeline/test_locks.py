"""One command at a time in a folder, and no lock that outlives its holder."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

import coin.pipeline.locks
from coin.cli import main
from coin.errors import CoinWarning, ConfigurationError, FileError
from coin.pipeline.locks import LOCK, folder_lock

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")]


def is_held(folder: Path) -> bool:
    """Return whether a process holds a folder."""
    path = folder / LOCK
    try:
        with FileLock(path, blocking=False, fallback_to_soft=False) if path.exists() else contextlib.nullcontext():
            return False
    except Timeout:
        return True


@contextlib.contextmanager
def holder(folder: Path, then: Callable[[], object] = lambda: time.sleep(60)) -> Iterator[int]:
    """Yield the number of a process that holds a folder and goes on with `then`; it is killed at the end."""
    ready, told = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.setsid()
            with folder_lock(folder):
                os.write(told, b"held")
                then()
        finally:
            os._exit(0)  # whatever happens: it must not go on with the tests of its parent
    os.close(told)  # where it ends early, reading ends too
    try:
        assert os.read(ready, 4) == b"held"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)


def test_a_second_command_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "nowhere")
    with holder(tmp_path) as process:
        told = rf"at work in .*\(process {process} on .*\), expected none; wait for it or stop it"
        for _ in range(2):  # who is refused leaves the holder's name alone
            with pytest.raises(ConfigurationError, match=told), folder_lock(tmp_path):
                raise AssertionError("held twice")
            assert is_held(tmp_path)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert not is_held(tmp_path)
        with folder_lock(tmp_path):
            pass


def child() -> None:
    subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


@pytest.mark.parametrize("start", [os.fork, child], ids=["forked", "started"])
def test_what_a_killed_process_leaves_behind_does_not_hold_its_lock(tmp_path: Path, start: Callable[[], None]) -> None:
    def with_child() -> None:
        start()  # lives on for seconds where its parent is killed, like a loader's worker or an expert's training
        time.sleep(60)

    with holder(tmp_path, with_child) as process:
        assert is_held(tmp_path)
        time.sleep(0.3)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert not is_held(tmp_path)


def test_a_forked_worker_that_ends_leaves_its_parents_lock_alone(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        if not (worker := os.fork()):
            os._exit(0)
        os.waitpid(worker, 0)
        with pytest.raises(ConfigurationError, match="at work"), folder_lock(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(CoinWarning, match="has no locks: run only one"), folder_lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot write .*choose a folder"), folder_lock(tmp_path / "file" / "folder"):
        pass


def test_coin_run_is_refused_where_another_is_at_work(
    finished: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    with holder(finished):
        assert main(["run", "-c", str(config), f"--output={finished.parent}", "--calibration.samples_per_task=9"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"coin: error: found another coin command at work in '{finished}'")
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != LOCK}
    assert {path: stamp for path, stamp in before.items() if path.name != LOCK} == after


def test_a_patient_process_waits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    monkeypatch.setattr(coin.pipeline.locks, "_POLL_SECONDS", 0.05)
    told = pytest.warns(CoinWarning, match="waiting for another coin")
    with holder(tmp_path, lambda: time.sleep(0.7)), told, folder_lock(tmp_path, patient=True):
        assert time.monotonic() - started > 0.3
