"""One command at a time in a folder, and no lock that outlives its holder."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import coin.experiment.locks
from coin.cli import main
from coin.errors import CoinWarning, ConfigurationError, FileError
from coin.experiment.locks import LOCK, alone_in, handed_on, locked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork, and no fcntl")


@contextlib.contextmanager
def holder(folder: Path, then: Callable[[], None] = lambda: time.sleep(60)) -> Iterator[int]:
    """Yield the number of a process that holds a folder and goes on with `then`; it is killed at the end."""
    ready, told = os.pipe()
    process = os.fork()
    if not process:
        os.setsid()
        with alone_in(folder):
            os.write(told, b"held")
            then()
        os._exit(0)
    try:
        assert os.read(ready, 4) == b"held"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)


def is_free(folder: Path) -> bool:
    with locked(folder / LOCK) as lock:
        return lock is not None


def test_a_second_command_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        told = rf"at work in .*\(process {process} on .*\), expected none; wait for it or stop it"
        with pytest.raises(ConfigurationError, match=told), alone_in(tmp_path):
            raise AssertionError("held twice")
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with alone_in(tmp_path):
            pass


def test_a_child_shares_the_lock_and_keeps_it_when_its_parent_lets_go(tmp_path: Path) -> None:
    with alone_in(tmp_path) as lock:
        variables, descriptors = handed_on(lock)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=descriptors)
    assert int(variables["COIN_LOCK"]) == descriptors[0]
    assert not is_free(tmp_path)
    child.communicate(b"\n", timeout=60)
    assert is_free(tmp_path)


def test_who_was_handed_a_lock_may_work_there_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(tmp_path / "theirs"), alone_in(tmp_path / "mine") as lock:
        variables, descriptors = handed_on(lock)
        monkeypatch.setenv("COIN_LOCK", variables["COIN_LOCK"])
        with alone_in(tmp_path / "mine") as shared:
            assert shared is None
            assert handed_on(shared) == (variables, descriptors)  # to a grandchild
        with pytest.raises(ConfigurationError, match="at work"), alone_in(tmp_path / "theirs"):
            pass
    # The variable alone is no pass: the descriptor is closed by now.
    with holder(tmp_path / "mine"), pytest.raises(ConfigurationError, match="at work"), alone_in(tmp_path / "mine"):
        pass


def test_a_forked_worker_does_not_hold_what_its_killed_parent_held(tmp_path: Path) -> None:
    def with_worker() -> None:
        os.fork()  # lives on for seconds where its parent is killed, like a loader's
        time.sleep(60)

    with holder(tmp_path, with_worker) as process:
        assert not is_free(tmp_path)
        time.sleep(0.2)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert is_free(tmp_path)


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
    with holder(finished):
        assert main(["run", "-c", str(config), f"--output={finished.parent}", "--calibration.samples_per_task=9"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"coin: error: found another coin command at work in '{finished}'")
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != LOCK}
    assert {path: stamp for path, stamp in before.items() if path.name != LOCK} == after


def test_a_patient_process_waits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    told = pytest.warns(CoinWarning, match="waiting for another coin")
    monkeypatch.setattr(coin.experiment.locks, "_POLL_SECONDS", 0.05)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with holder(tmp_path, lambda: time.sleep(0.7)), told, alone_in(tmp_path, patient=True):
        assert time.monotonic() - started > 0.3
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3  # no file a look
