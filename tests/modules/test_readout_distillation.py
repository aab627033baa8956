from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from coin.coding import fit_ridge
from coin.data import Augmentation
from coin.distillation import Distillation, ReadoutDistillation
from coin.errors import ConfigurationError
from coin.networks import features_and_logits, load_network

ROW = [0.25, 0.75]


def trained(experts, data, make_trainer, kind=ReadoutDistillation, **options):
    module = kind(**options).module(ROW, experts)
    make_trainer(max_steps=module.hparams["steps"], max_epochs=-1).fit(module, datamodule=data)
    return module


def readout_error(module, data):
    """The error of the best affine readout of each expert's answers from the student's features on its own samples."""
    calibration = data.calibration()
    with torch.no_grad():
        features = features_and_logits(module.student, calibration.inputs())[0]
        outputs = module.expert_outputs(calibration.inputs())
    total = 0.0
    for task in range(2):
        own = calibration.part == task
        x, y = features[own], outputs[task][own]
        total += float((fit_ridge(x, y)(x.double()) - y).square().sum())
    return total


def test_the_first_readouts_are_the_experts_heads(experts):
    module = ReadoutDistillation().module(ROW, experts)
    module.configure_model()
    second = load_network(Path(experts[1])).network
    assert torch.equal(module.readouts[1].weight[:2], second.fc.weight)
    assert torch.equal(module.readouts[1].weight[2], torch.zeros_like(second.fc.weight[0]))
    assert torch.equal(module.readouts[1].bias[:2], second.fc.bias)


def test_the_loss_of_a_step_is_coding_plus_weighted_readout(experts, tasks, make_trainer):
    module = ReadoutDistillation(steps=1, batch_size=8, augmentation="none", readout_weight=0.3).module(ROW, experts)
    losses = []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: losses.append((batch, step(batch, batch_idx))) or losses[-1][1]
    seen = {}
    module.on_train_batch_start = lambda batch, batch_idx: seen.update(
        student={k: v.clone() for k, v in module.student.state_dict().items()},
        readouts=[r(torch.eye(r.in_features)).detach() - r.bias for r in module.readouts],
        biases=[r.bias.detach().clone() for r in module.readouts],
    )
    data = tasks()
    make_trainer(max_steps=1, max_epochs=-1).fit(module, datamodule=data)
    (positions, inputs), loss = losses[0]
    module.student.load_state_dict(seen["student"])
    with torch.no_grad():
        features, logits = features_and_logits(module.student, inputs)
        outputs = module.expert_outputs(inputs)
    coding = 0.5 * (logits - 0.25 * outputs[0] - 0.75 * outputs[1]).square().sum(1).mean()
    errors = []
    for place, position in enumerate(positions.tolist()):
        task = int(data.calibration().part[position])
        read = features[place] @ seen["readouts"][task] + seen["biases"][task]
        errors.append((read - outputs[task][place]).square().sum())
    expected = coding + 0.3 * 0.5 * torch.stack(errors).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_experts_answers_are_better_readable_with_readouts_than_without(experts, tasks, make_trainer):
    options = {"steps": 60, "lr": 3e-3, "batch_size": 8, "augmentation": "none"}
    data = tasks()
    with_readouts = trained(experts, data, make_trainer, readout_weight=1.0, **options)
    without = trained(experts, data, make_trainer, readout_weight=0.0, **options)
    assert readout_error(with_readouts, data) < 0.7 * readout_error(without, data)


def test_only_samples_that_are_trained_on_are_augmented(experts, tasks, make_trainer):
    data = tasks()
    plain = [batch[1] for batch in data.train_dataloader()]
    trained(experts, data, make_trainer, Distillation, lr=1e-3, steps=5, augmentation="shift")
    views = [batch[1] for batch in data.train_dataloader()]
    assert data.augmentation is Augmentation.shift
    assert not all(torch.equal(view, image) for view, image in zip(views, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(data.calibration(), tasks().calibration(), strict=True))


def test_bad_options_are_refused(experts):
    with pytest.raises(ConfigurationError, match="found readout_weight=-1"):
        ReadoutDistillation(readout_weight=-1)
    with pytest.raises(ConfigurationError, match="found augmentation='mirror', expected one of none, crop"):
        ReadoutDistillation(augmentation="mirror")


class Killed(Callback):
    """Writes a checkpoint after a step, and kills the run in the next one."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyError("killed")


@pytest.mark.parametrize("kind", [Distillation, ReadoutDistillation])
@pytest.mark.parametrize(("augmentation", "step"), [("none", 5), ("shift", 10)])
@pytest.mark.slow
def test_a_run_killed_and_resumed_equals_an_undisturbed_one(
    tmp_path, experts, tasks, make_trainer, kind, augmentation, step
):
    """Five steps an epoch: both are an epoch's first; a training goes on from whole epochs."""

    def run(callbacks=(), ckpt_path=None):
        module = kind(steps=12, lr=1e-3, batch_size=8, augmentation=augmentation).module(ROW, experts)
        trainer = make_trainer(max_steps=12, max_epochs=-1, callbacks=list(callbacks))
        trainer.fit(module, datamodule=tasks(), ckpt_path=ckpt_path)
        return module

    undisturbed = run()
    with pytest.raises(KeyError, match="killed"):
        run([Killed(step, tmp_path / "killed.ckpt")])
    resumed = run(ckpt_path=tmp_path / "killed.ckpt")
    wanted, found = undisturbed.state_dict(), resumed.state_dict()
    assert [name for name in wanted if not found[name].equal(wanted[name])] == []
    assert resumed.passes == undisturbed.passes


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 100])
def test_the_learning_rate_rises_and_falls_over_any_number_of_steps(experts, tasks, steps):
    module = ReadoutDistillation(lr=1.0, steps=steps).module(ROW, experts)
    module.configure_model()
    options = module.configure_optimizers()
    optimizer, schedule = options["optimizer"], options["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(steps + 3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    if steps != 10:  # where torch's own divides by zero
        plain = OneCycleLR(
            SGD([torch.zeros(1)], 1.0),
            1.0,
            total_steps=steps,
            pct_start=0.1,
            anneal_strategy="linear",
            cycle_momentum=False,
        )
        for rate in rates[:steps]:
            assert rate == plain.get_last_lr()[0]
            plain.optimizer.step()
            plain.step()
    else:
        assert rates[0] == pytest.approx(1 / 25)
        assert 0.8 < max(rates) == rates[1] <= 1
    assert rates[steps - 1] == pytest.approx(1 / 25e4)
    assert rates[steps:] == [rates[steps - 1]] * 3, "training on goes on with the last rate"


def test_the_readout_loss_is_taken_in_full_precision(experts, tasks, make_trainer, monkeypatch):
    module = ReadoutDistillation(steps=1, batch_size=8).module(ROW, experts)
    losses = {}
    log = module.log
    monkeypatch.setattr(module, "log", lambda name, value, **options: losses.update({name: value}) or log(name, value))
    make_trainer(max_steps=1, max_epochs=-1, precision="bf16-mixed").fit(module, datamodule=tasks())
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert losses.keys() == {"train/loss", "train/readout_loss"}
