"""What is told of progress: nothing without a terminal, and never on standard output."""

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


def test_without_a_terminal_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    rich.reconfigure()
    with progress("work", 3) as advance:
        advance()
    assert list(tracked([1, 2], "work")) == [1, 2]
    assert capsys.readouterr() == ("", "")
