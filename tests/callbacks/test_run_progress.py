"""A Trainer on a terminal: one bar for a whole run, and none of Lightning's own."""

import io

import pytest
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from rich.console import Console

from coin.callbacks import RunProgress
from coin.data.tasks import Tasks
from coin.modules import Expert
from coin.progress import shown

SMALL = {"network": "small_resnet", "image_size": 16, "options": {"width": 4}, "num_classes": 3}


@pytest.fixture
def watched():
    """Return a function that runs something as on a terminal, and returns what was written."""

    def watch(run) -> str:
        stream = io.StringIO()
        with shown(Console(file=stream, force_terminal=True, width=120, color_system=None)):
            run()
        return stream.getvalue()

    return watch


def test_a_training_has_one_bar_over_all_epochs(watched, make_trainer, synthetic, capsys):
    trainer = make_trainer(max_epochs=2, enable_progress_bar=True)
    written = watched(lambda: trainer.fit(Expert(**SMALL), datamodule=synthetic()))
    assert "epoch 2 of 2" in written
    assert "100%" in written
    assert "validating" not in written  # a part of the training
    assert "Epoch" not in capsys.readouterr().out  # Lightning's bars would be on standard output


def test_the_other_runs_count_their_batches(watched, make_trainer, synthetic):
    trainer = make_trainer(enable_progress_bar=True)
    expert = Expert(**SMALL)
    assert "validating" in watched(lambda: trainer.validate(expert, datamodule=synthetic(), verbose=False))
    assert "evaluating" in watched(lambda: trainer.test(expert, datamodule=synthetic(), verbose=False))
    tasks = Tasks({"a": synthetic(), "b": synthetic(key=1)}, 8, 4)
    written = watched(lambda: trainer.statistic_sums(expert.network, tasks))
    assert "calibration samples" in written
    assert "100%" in written


def test_nobody_watches_and_nothing_is_written(make_trainer, synthetic, capfd):
    make_trainer(max_epochs=1, enable_progress_bar=True).fit(Expert(**SMALL), datamodule=synthetic())
    captured = capfd.readouterr()
    assert "training" not in captured.out + captured.err


def test_one_bar_at_most(make_trainer):
    def bars(**options):
        return [type(c) for c in make_trainer(**options).callbacks if isinstance(c, ProgressBar)]

    assert bars(enable_progress_bar=True) == [RunProgress]
    assert bars(enable_progress_bar=True, callbacks=TQDMProgressBar()) == [TQDMProgressBar]
    assert bars(enable_progress_bar=False) == []
