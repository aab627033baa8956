from pathlib import Path

import pytest
import torch
from torch import nn

from coin.data import Augmentation, Calibration
from coin.data.loading import Batches
from coin.data.tasks import Tasks
from coin.distillation import Distillation
from coin.errors import ConfigurationError, HeadError, StateError
from coin.merging import Experts, Refit, average
from coin.merging.closed_form import MergeMethod
from coin.merging.expert_sources import ExpertFiles
from coin.modules import DistillationModule
from coin.pipeline.steps.merge import Training

ROW = [0.25, 0.75]
STILL = {"lr": 1e-12, "steps": 1, "batch_size": 8, "augmentation": "none"}  # which moves nothing


@pytest.fixture
def of_files(write_experts, synthetic, tmp_path):
    """Return a function that gives the experts in files, with their tasks to train on."""
    paths = {task: Path(path) for task, path in write_experts([3, 2]).items()}

    def make():
        tasks = {"task0": synthetic(3, key=1), "task1": synthetic(2, key=2)}
        data = Tasks(tasks, samples_per_task=20, batch_size=8)
        data.setup()
        calibration = list(data.calibrations().values())
        return Experts(ExpertFiles(paths), calibration=calibration, train=Training(data, tmp_path, 0))

    return make


def test_the_student_starts_from_the_weighted_average_or_that_with_its_head_fitted(of_files, monkeypatch):
    experts = of_files()
    plain = Distillation(**STILL, start="average").make(experts, ROW)
    averaged = plain.network.state_dict()
    first, second = experts.parameters
    for name in first:
        torch.testing.assert_close(averaged[name], 0.25 * first[name] + 0.75 * second[name])
    fitted = Distillation(**STILL).make(experts, ROW)
    assert fitted.chosen["start"] == "head_fit"
    for name, tensor in fitted.network.state_dict().items():
        assert torch.allclose(averaged[name].float(), tensor.float(), atol=1e-6) != name.startswith("fc."), name

    def refuse(*_, **__):
        raise HeadError("found a head 'conv' of type Conv2d")

    monkeypatch.setattr(average, "fit_head", refuse)
    made = Distillation(**STILL).make(experts, ROW)
    assert made.chosen["start"] == "average"
    for name, tensor in made.network.state_dict().items():
        torch.testing.assert_close(tensor, averaged[name])
    with pytest.raises(StateError, match="found a head 'conv'"):
        Distillation(**STILL, start="head_fit").make(experts, ROW)


def test_it_goes_on_from_a_refit(of_files):
    experts = of_files()
    made = Distillation(**STILL, start="refit").make(experts, ROW)
    expected = Refit().coded_model(experts, ROW)
    for name, tensor in expected.network.state_dict().items():
        torch.testing.assert_close(made.network.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert made.chosen["start"] == "refit"


class InPlace(nn.Linear):
    """Changes its inputs."""

    def forward(self, x):
        return super().forward(x.sub_(1))


@pytest.fixture
def trained(make_trainer):
    """Return a function that trains a small student of two teachers, which give the targets unless these are given."""

    def train(samples, teachers, held_out=None, **targets):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval()
        module = DistillationModule(student, teachers, ROW, lr=1e-2, steps=4, **targets)
        trainer = make_trainer(max_steps=4, max_epochs=-1, check_val_every_n_epoch=None, val_check_interval=4)
        validation = [] if held_out is None else Batches(held_out, 3, trainer)
        trainer.fit(module, Batches(samples, 8, trainer, 0, Augmentation.none), validation)
        return module

    return train


def mixed(teachers, samples):
    with torch.no_grad():
        first, second = (teacher(samples.inputs()) for teacher in teachers)
    return 0.25 * first + 0.75 * second


def test_teachers_run_on_copies_of_what_the_student_gets(trained):
    torch.manual_seed(1)
    teachers = [InPlace(4, 3), InPlace(4, 3)]
    samples = Calibration.of([torch.randn(16, 4)])
    asked = trained(samples, teachers)
    told = trained(samples, teachers, targets=mixed(teachers, samples))
    torch.testing.assert_close(asked.student.state_dict(), told.student.state_dict())
    assert (asked.passes, told.passes) == (4 * 8 * (3 + 2), 4 * 8 * 3)
    assert not any(inner.training for inner in asked.train().student.modules())


def test_the_held_out_loss_is_of_samples_that_training_leaves_out(trained):
    torch.manual_seed(1)
    teachers = [nn.Linear(4, 3), nn.Linear(4, 3)]
    fitted, held_out = Calibration.of([torch.randn(20, 4)]).split(0.2)
    targets = mixed(teachers, held_out)
    module = trained(fitted, teachers, held_out, held_out_targets=targets)
    with torch.no_grad():
        loss = 0.5 * (module.student(held_out.inputs()) - targets).square().sum(1).mean()
    assert module.held_out_loss == pytest.approx(float(loss), rel=1e-5)


def start_passes(fitted, held_out, known=0, *, head_fit):
    """What a start takes where the experts' outputs on so many samples are known.

    Both BatchNorm policies on the held-out samples, recalibrated on the others; then fitting the head.
    """
    experts = 2 * (fitted + held_out if head_fit else held_out)
    policies = held_out + (fitted + held_out)
    return experts - 2 * known + policies + (fitted + held_out if head_fit else 0)


@pytest.mark.parametrize("recalibrated", [False, True])
@pytest.mark.slow
def test_passes_count_forward_equivalents(of_files, recalibrated, monkeypatch):
    """The start takes the policy with the smaller residual, and one more pass of all samples to recalibrate."""
    measured = MergeMethod._held_out_residuals

    def given(method, experts, row, parameters, policies):
        measured(method, experts, row, parameters, policies)
        return {policy: float((policy == "recalibrate") != recalibrated) for policy in policies}

    monkeypatch.setattr(MergeMethod, "_held_out_residuals", given)

    def passes(**options):
        experts = of_files()
        Distillation(batch_size=8, **options).make(experts, ROW)
        return experts.passes

    plain = {"start": "average", "augmentation": "none"}
    start = start_passes(32, 8, head_fit=False) + 40 * recalibrated
    assert passes(lr=1e-3, steps=15, **plain) == start + 32 * 2 + 15 * 8 * 3
    trial = start_passes(26, 6, head_fit=False) + 32 * recalibrated
    again = start_passes(32, 8, known=8, head_fit=False) + 40 * recalibrated
    tuned = trial + 40 * 2 + (12 * 8 * 3 + 8) + again + 12 * 8 * 3
    assert passes(learning_rates=[1e-3], steps=12, **plain) == tuned
    start = start_passes(32, 8, head_fit=True) + 40 * recalibrated
    assert passes(lr=1e-3, steps=7) == start + 7 * 8 * (3 + 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "found lr=0.0, expected a number above 0"),
        ({"lr": float("nan")}, "found lr=nan, expected a number above 0"),
        ({"samples_per_task": 0}, "found samples_per_task=0, expected a whole number of at least 1"),
        ({"learning_rates": []}, r"found learning_rates=\[\], expected at least one"),
        ({"start": "refined"}, "found start='refined', expected one of auto, average, .*refit"),
        ({"learning_rates": [1e-3, -1.0]}, "found learning_rates=-1.0, expected a number above 0"),
        ({"steps": 0}, "found steps=0"),
        ({"seed": -1}, "found seed=-1"),
        ({"batch_size": 1}, "found batch_size=1, expected a whole number of at least 2"),
        *(({"label": label}, "found label") for label in ("", "a/b", "oracle")),
    ],
)
def test_bad_options_are_refused_at_construction(options, message):
    assert Distillation(label="long").label == "long"
    with pytest.raises(ConfigurationError, match=message):
        Distillation(**options)
