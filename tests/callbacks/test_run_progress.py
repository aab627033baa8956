"""A Trainer's bar, on standard error."""

import re

from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from coin.callbacks import StepProgress
from coin.modules import Expert

SMALL = {"network": "small_resnet", "image_size": 16, "options": {"width": 4}, "num_classes": 3}


def test_one_bar_at_most(make_trainer):
    def bars(**options):
        return [type(c) for c in make_trainer(**options).callbacks if isinstance(c, ProgressBar | StepProgress)]

    assert bars(enable_progress_bar=True) == [StepProgress]
    assert bars(enable_progress_bar=True, callbacks=TQDMProgressBar()) == [TQDMProgressBar]
    assert bars(enable_progress_bar=False) == []


def test_without_a_terminal_a_training_tells_how_long_it_will_take(make_trainer, synthetic, monkeypatch, capsys):
    monkeypatch.setattr("coin.core.progress.EVERY", 0.0)
    trainer = make_trainer(max_epochs=2, enable_progress_bar=True, accumulate_grad_batches=2)
    trainer.fit(Expert(**SMALL), datamodule=synthetic())
    printed = capsys.readouterr()
    assert printed.out == ""
    told = [line for line in re.split("[\r\n]", printed.err) if line.startswith("training: ")]
    assert trainer.global_step > 1
    assert told[-1].startswith("training: 100%")
