"""A training that leaves in the middle of an epoch and comes back, in a SLURM job of one task."""

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from coin.callbacks.requeue import STATUS
from coin.modules import Expert

SMALL = {"network": "small_resnet", "image_size": 16, "options": {"width": 4}, "num_classes": 3}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The environment of a job of one task; what scontrol is told goes into a file."""
    for name, value in {"JOB_ID": "77", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    before = signal.getsignal(signal.SIGUSR1)
    yield tmp_path
    signal.signal(signal.SIGUSR1, before)


class Watch(Callback):
    """Notes the labels of every step, and sends the signal in one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.labels = at, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.labels.append((trainer.global_step, batch[1].tolist()))
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGUSR1)


def fit(make_trainer, data, watch, checkpoints=True):
    callbacks = [watch, *([ModelCheckpoint(save_last=True, save_top_k=0)] if checkpoints else [])]
    expert = Expert(**SMALL, seed=2)
    make_trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=checkpoints).fit(expert, datamodule=data)
    return expert.state_dict()


@pytest.mark.parametrize("at", [1, 5, 7])
def test_an_interrupted_training_ends_where_an_undisturbed_one_does(job, synthetic, make_trainer, at):
    """Four steps an epoch: steps 1 and 5 are in the middle of one, and step 7 is an epoch's last."""
    undisturbed = Watch()
    wanted = fit(make_trainer, synthetic(), undisturbed)
    first, second = Watch(at), Watch()
    with pytest.raises(SystemExit) as left:
        fit(make_trainer, synthetic(), first)
    assert left.value.code == STATUS
    assert (job / "told").read_text() == "requeue 77\n"
    step = 1 + at if at != 7 else 9  # after an epoch's last step its own checkpoint comes first
    assert torch.load(job / "run/requeue-77.ckpt", weights_only=True)["global_step"] == step
    found = fit(make_trainer, synthetic(), second)
    assert first.labels + second.labels == undisturbed.labels
    assert [name for name in wanted if not found[name].equal(wanted[name])] == []
    assert not list((job / "run").glob("requeue-*"))


def test_other_work_leaves_at_once_and_without_a_checkpoint(job, synthetic, make_trainer):
    with pytest.raises(SystemExit) as left:
        fit(make_trainer, synthetic(), Watch(at=1), checkpoints=False)
    assert left.value.code == STATUS
    assert not list((job / "run").glob("requeue-*"))
    make_trainer()
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert (job / "told").read_text() == "requeue 77\n" * 2


def test_a_checkpoint_of_another_job_is_not_gone_on_from(job, synthetic, make_trainer, monkeypatch):
    with pytest.raises(SystemExit):
        fit(make_trainer, synthetic(), Watch(at=1))
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    again = Watch()
    fit(make_trainer, synthetic(), again)
    assert again.labels[0][0] == 0


def test_outside_a_job_nothing_listens(make_trainer):
    assert make_trainer().requeue is None
