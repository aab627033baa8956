"""What is told of progress: a bar on a terminal, else a line now and then, and nothing on standard output."""

import sys

import pytest
import rich

from coin.core.progress import progress, tracked


def interrupted(total: int | None) -> None:
    """Do three steps, and two of other work within, which prints its results."""
    with progress("gauss_newton [x]", total) as advance:
        for _ in range(3):
            advance()
        for _ in tracked(["a", "b"], "inner"):
            print("a result")
        raise KeyboardInterrupt


@pytest.mark.parametrize("total", [4, None])
def test_a_terminal_shows_the_share_and_is_left_clean(
    total: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    rich.reconfigure()
    with pytest.raises(KeyboardInterrupt):
        interrupted(total)
    printed = capsys.readouterr()
    assert printed.out == "a result\n" * 2
    assert "gauss_newton [x]" in printed.err
    assert "inner" in printed.err
    assert ("75%" in printed.err) == (total is not None)
    assert not printed.err.rpartition("\x1b[2K")[2].strip("\r\n\x1b[?25h")  # the line is wiped, the cursor is back


def test_without_a_terminal_nothing_is_written_of_what_is_soon_done(capsys: pytest.CaptureFixture[str]) -> None:
    rich.reconfigure()
    with progress("work", 3) as advance:
        advance()
    assert list(tracked([1, 2], "work")) == [1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, of which there is one number, on a machine without a terminal."""
    rich.reconfigure()
    time = [0.0]
    monkeypatch.setattr("coin.core.progress.time.monotonic", lambda: time[0])
    return time


def test_without_a_terminal_long_work_says_now_and_then_how_long_it_will_take(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    for total in (10, None, float("inf")):
        with progress("work [x]", total) as advance:
            for _ in range(7):
                clock[0] += 12.0
                advance()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["work [x]: 30%, about 84 s left", "work [x]: 60%, about 48 s left"]


def test_without_a_terminal_nothing_is_said_of_the_last_seconds(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with progress("work", 100) as advance:
        for _ in range(99):
            clock[0] += 0.32
            advance()
    assert capsys.readouterr().err == ""
