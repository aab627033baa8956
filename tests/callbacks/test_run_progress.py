"""A Trainer's bar: on a terminal's standard error, gone at the end, and nowhere else."""

import re
import sys

import pytest
import rich
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from coin.callbacks import LoggedProgress, RunProgress
from coin.modules import Expert

SMALL = {"network": "small_resnet", "image_size": 16, "options": {"width": 4}, "num_classes": 3}


@pytest.mark.parametrize("watched", [True, False])
def test_a_run_has_a_bar_where_somebody_watches(watched, make_trainer, synthetic, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    rich.reconfigure()
    expert = Expert(**SMALL)
    trainer = make_trainer(max_epochs=2, enable_progress_bar=True)
    trainer.fit(expert, datamodule=synthetic())
    written = capsys.readouterr()
    assert written.out == ""
    assert ("Epoch 1/1" in written.err) == watched
    trainer.test(expert, datamodule=synthetic(), verbose=False)
    written = capsys.readouterr()
    assert written.out == ""
    assert ("Testing" in written.err) == watched
    assert not rich.get_console().stderr  # what Lightning prints after it are results
    assert not written.err.rpartition("\x1b[2K")[2].strip("\r\n\x1b[?25h")


def test_one_bar_at_most(make_trainer, monkeypatch):
    def bars(**options):
        return [type(c) for c in make_trainer(**options).callbacks if isinstance(c, ProgressBar)]

    assert bars(enable_progress_bar=True) == []
    assert bars(enable_progress_bar=True, callbacks=TQDMProgressBar()) == [TQDMProgressBar]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert bars(enable_progress_bar=True) == [RunProgress]
    assert bars(enable_progress_bar=True, callbacks=TQDMProgressBar()) == [TQDMProgressBar]
    assert bars(enable_progress_bar=False) == []


def test_without_a_terminal_a_training_tells_how_long_it_will_take(make_trainer, synthetic, monkeypatch, capsys):
    monkeypatch.setattr("coin.core.progress.EVERY", 0.0)
    trainer = make_trainer(max_epochs=2, enable_progress_bar=True, accumulate_grad_batches=2)
    trainer.fit(Expert(**SMALL), datamodule=synthetic())
    told = [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.startswith("training: ")]
    assert trainer.global_step > 1
    assert told[-1].startswith("training: 100%")
    quiet = make_trainer(enable_progress_bar=False)
    assert not any(isinstance(each, LoggedProgress) for each in quiet.callbacks)
