"""What is shown of progress: a bar on a terminal, else a line now and then, and nothing on standard output."""

import sys

import pytest

from coin.core.progress import progress_bar


def interrupted(total):
    """Do three steps, and two of other work within, which prints its results."""
    with progress_bar("refit [x]", total) as bar:
        for _ in range(3):
            bar.update()
        for _ in progress_bar("inner", items=["a", "b"]):
            print("a result")
        raise KeyboardInterrupt


@pytest.mark.parametrize("total", [4, None, float("inf")])
def test_a_terminal_shows_the_share_and_is_left_clean(total, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(KeyboardInterrupt):
        interrupted(total)
    printed = capsys.readouterr()
    assert printed.out == "a result\n" * 2
    assert "refit [x]" in printed.err
    assert ("0/4" in printed.err) == (total == 4)
    last_line = printed.err.split("\r")[-2]
    assert not last_line.strip()  # it is wiped


def test_without_a_terminal_nothing_is_written_of_what_is_soon_done(capsys):
    with progress_bar("work", 3) as bar:
        bar.update()
    assert list(progress_bar("work", items=[1, 2])) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_long_work_is_told_of(capsys, monkeypatch):
    monkeypatch.setattr("coin.core.progress.EVERY", 0.0)
    with progress_bar("work", 10) as bar:
        for _ in range(3):
            bar.update(2)
    printed = capsys.readouterr()
    assert printed.out == ""
    shares = [each[:10] for each in printed.err.split("\r") if "work" in each]
    assert shares[1:] == ["work:  20%", "work:  40%", "work:  60%"]
