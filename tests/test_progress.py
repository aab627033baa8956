"""What is told of progress: nothing where nobody watches, one line a piece of work on a terminal."""

import io

from rich.console import Console

from coin.progress import progress, shown, tracked


def terminal() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=100, color_system=None), stream


def test_without_a_display_nothing_happens():
    with progress("work", 3) as bar:
        bar.advance()
        bar.reach(2, "half")
    assert list(tracked([1, 2], "work")) == [1, 2]


def test_on_a_pipe_nothing_is_written():
    stream = io.StringIO()
    with shown(Console(file=stream)), progress("work", 3) as bar:
        bar.advance()
    assert stream.getvalue() == ""


def test_a_terminal_shows_the_share_and_the_note_and_is_left_clean():
    console, stream = terminal()
    with shown(console):
        with progress("gauss_newton", 4) as bar:
            bar.advance(2)
            bar.reach(3, "step 1 of 2")
        written = stream.getvalue()
        assert "gauss_newton" in written
        assert "left" in written
        assert "75%" in written
        assert "step 1 of 2" in written
        assert not written.rpartition("\x1b[2K")[2].strip("\r\n\x1b[?25h")  # the line is wiped, the cursor is back
        with progress("the next", 1):
            pass
        assert "the next" in stream.getvalue()
    with progress("afterwards", 1):
        pass
    assert "afterwards" not in stream.getvalue()


def test_work_within_work_has_its_own_line():
    console, stream = terminal()
    with shown(console), progress("outer", 2):
        for _ in tracked(["a", "b"], "inner"):
            pass
        with shown(console):  # already shown: the second one leaves it to the first
            pass
    frame = stream.getvalue()
    assert "outer" in frame
    assert "inner" in frame


def test_an_interrupted_piece_of_work_is_taken_away():
    console, stream = terminal()
    with shown(console):
        try:
            with progress("broken", 2):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        with progress("sound", 2) as bar:
            bar.advance()
    assert "broken" not in stream.getvalue().rpartition("sound")[2]
