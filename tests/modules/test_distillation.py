"""Distillation: where it starts, what it trains on, what it costs, and what it leaves as it was."""

import logging
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import coin
from coin.data import Augmentation, Calibration
from coin.data.loading import Batches
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError, NumericalError, StateError
from coin.merging import Experts, HeadFit
from coin.merging.expert_sources import ExpertFiles
from coin.modules import DistillationModule
from coin.pipeline.steps.merge import Training

ROW = [0.4, 0.6]
FAST = {"lr": 1e-2, "steps": 40, "batch_size": 8}
STILL = {"lr": 1e-12, "steps": 1, "batch_size": 8, "augmentation": "none"}  # which moves nothing


class Net(nn.Module):
    def __init__(self, classes=3, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh())
        self.head = nn.Linear(8, classes, bias=bias)

    def forward(self, x):
        return self.head(self.body(x))


class Named(Net):
    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x))


def make_experts(kind=Net, **options):
    """Return two experts, the first in training mode."""
    experts = []
    for seed in range(2):
        torch.manual_seed(seed)
        experts.append(kind(**options).train(seed == 0))
    return experts


@pytest.fixture
def inputs():
    """For each expert 30 samples in batches of 8."""
    samples = torch.randn(60, 6, generator=torch.Generator().manual_seed(5))
    return [list(samples[:30].split(8)), list(samples[30:].split(8))]


def distil(experts, inputs, **options):
    (made,) = coin.merge_networks(coin.Distillation(**options), experts, [ROW], calibration=inputs)
    return made


def states_equal(one, other):
    other = other.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items())


STARTS = {
    "average": coin.Average(),
    "head_fit": HeadFit(),
    "coin": coin.Coin(),
    "regmean": coin.RegMean(),
    "refit": coin.Refit(),
    "auto": HeadFit(),
}


@pytest.mark.parametrize("start", STARTS)
def test_it_starts_from_a_closed_form(start, inputs):
    experts = make_experts()
    (expected,) = coin.merge_networks(STARTS[start], experts, [ROW], calibration=inputs)
    made = distil(experts, inputs, **STILL, start=start)
    torch.testing.assert_close(made.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


def test_it_starts_from_the_average_where_no_head_can_be_fitted(inputs):
    experts = make_experts(bias=False)
    for expert in experts:
        expert.head = nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 3, 1), nn.Flatten())
    of_all = Experts(experts, calibration=inputs)
    assert coin.Distillation(**STILL).make(of_all, ROW).chosen["start"] == "average"
    with pytest.raises(StateError, match="head"):
        distil(experts, inputs, **STILL, start="head_fit")


@pytest.fixture
def of_files(write_experts, synthetic, tmp_path):
    """Experts in files, with their tasks to train on."""
    paths = {task: Path(path) for task, path in write_experts([3, 2]).items()}
    tasks = {"task0": synthetic(3, key=1), "task1": synthetic(2, key=2)}
    data = Tasks(tasks, samples_per_task=20, batch_size=8)
    data.setup()
    calibration = list(data.calibrations().values())
    return Experts(ExpertFiles(paths), calibration=calibration, train=Training(data, tmp_path, 0))


def test_experts_in_files_are_distilled_on_as_many_augmented_samples_as_it_is_told(of_files):
    made = coin.Distillation(lr=1e-3, steps=3, batch_size=8, samples_per_task=12).make(
        of_files, ROW
    )
    (start,) = coin.merge_networks(
        HeadFit(), of_files.networks, [ROW], calibration=of_files.samples("own")
    )
    assert not states_equal(made.network, start)
    before = of_files.passes
    coin.Distillation(lr=1e-3, steps=3, batch_size=8, start="average").make(of_files, ROW)
    # Both BatchNorm policies on 8 held-out samples and 40 to recalibrate, the experts' answers to the 8 among them.
    start_passes = 2 * 8 + 8 + (8 + 32)
    assert of_files.passes - before == start_passes + 3 * 8 * (3 + 2)


@pytest.fixture
def trained(make_trainer):
    """Return a function that trains a small student of two teachers, which give the targets unless these are given."""

    def train(samples, teachers, held_out=None, **targets):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval()
        module = DistillationModule(student, teachers, ROW, lr=1e-2, steps=4, **targets)
        trainer = make_trainer(
            max_steps=4, max_epochs=-1, check_val_every_n_epoch=None, val_check_interval=4
        )
        validation = [] if held_out is None else Batches(held_out, 3, trainer)
        trainer.fit(module, Batches(samples, 8, trainer, 0, Augmentation.none), validation)
        return module

    return train


def mixed(networks, samples):
    """Return 0.4 f_1 + 0.6 f_2."""
    with torch.no_grad():
        first, second = (deepcopy(network).eval()(samples.clone()) for network in networks)
    return 0.4 * first + 0.6 * second


class InPlace(nn.Linear):
    """Changes its inputs."""

    def forward(self, x):
        return super().forward(x.sub_(1))


def test_teachers_run_on_copies_of_what_the_student_gets(trained):
    torch.manual_seed(1)
    teachers = [InPlace(4, 3), InPlace(4, 3)]
    samples = Calibration.of([torch.randn(16, 4)])
    asked = trained(samples, teachers)
    told = trained(samples, teachers, targets=mixed(teachers, samples.inputs()))
    torch.testing.assert_close(asked.student.state_dict(), told.student.state_dict())
    assert (asked.passes, told.passes) == (4 * 8 * (3 + 2), 4 * 8 * 3)
    assert not any(inner.training for inner in asked.train().student.modules())


def test_the_held_out_loss_is_half_the_squared_distance_on_samples_that_are_left_out(trained):
    torch.manual_seed(1)
    teachers = [nn.Linear(4, 3), nn.Linear(4, 3)]
    fitted, held_out = Calibration.of([torch.randn(20, 4)]).split(0.2)
    targets = mixed(teachers, held_out.inputs())
    module = trained(fitted, teachers, held_out, held_out_targets=targets)
    with torch.no_grad():
        error = (module.student(held_out.inputs()) - targets).numpy()
    expected = 0.5 * np.square(error).sum(1).mean()
    assert module.held_out_loss == pytest.approx(expected, rel=1e-5)


def test_losses_are_in_float32_where_networks_run_in_bf16(make_trainer):
    student = nn.Linear(4, 3).eval()
    module = DistillationModule(student, [nn.Linear(4, 3)] * 2, ROW, lr=1e-3, steps=2)
    trainer = make_trainer(precision="bf16-mixed", max_steps=2, max_epochs=-1)
    samples = Calibration.of([torch.randn(16, 4)])
    trainer.fit(module, Batches(samples, 8, trainer, 0, Augmentation.none))
    assert trainer.callback_metrics["train/loss"].dtype == torch.float32
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_it_comes_nearer_than_its_start(inputs):
    experts = make_experts()
    made = distil(experts, inputs, lr=1e-2, steps=200, start="average", batch_size=32)
    (start,) = coin.merge_networks(coin.Average(), experts, [ROW], calibration=inputs)
    samples = torch.cat([batch for batches in inputs for batch in batches])
    wanted = mixed(experts, samples)
    with torch.no_grad():
        losses = [(network(samples) - wanted).square().mean() for network in (made, start)]
    assert losses[0] < 0.2 * losses[1]
    for name, buffer in made.named_buffers():
        assert torch.equal(buffer, start.get_buffer(name))
    assert not any(module.training for module in made.modules())
    assert all(parameter.grad is None for parameter in made.parameters())


def test_experts_random_numbers_and_loggers_are_left_as_found(inputs, capfd, caplog, recwarn):
    experts = make_experts()
    before = deepcopy(experts)
    torch.manual_seed(17)
    state = torch.get_rng_state()
    level = logging.getLogger("lightning.pytorch").level
    distil(experts, inputs, **FAST)
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger("lightning.pytorch").level == level
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not [warning for warning in recwarn if "lightning" in str(warning.filename)]
    for expert, own in zip(experts, before, strict=True):
        modes = [module.training for module in expert.modules()]
        assert modes == [module.training for module in own.modules()]
        assert states_equal(expert, own)
        assert all(each.requires_grad and each.grad is None for each in expert.parameters())


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_seed_gives_the_same_network_in_any_context(context, inputs):
    wanted = distil(make_experts(), inputs, **FAST)
    torch.manual_seed(99)
    with context():
        found = distil(make_experts(), inputs, **FAST, seed=0)
    assert states_equal(found, wanted)
    assert not states_equal(distil(make_experts(), inputs, **FAST, seed=3), wanted)


def test_batches_by_name_train_as_well(inputs):
    named = [[{"x": batch} for batch in batches] for batches in inputs]
    found = distil(make_experts(Named), named, **FAST)
    assert type(found) is Named
    assert states_equal(found, distil(make_experts(), inputs, **FAST))


@pytest.mark.parametrize("whole", [False, True])
def test_frozen_parameters_stay_unless_all_are(whole, inputs):
    experts = make_experts()
    first, second = (expert.body[0] for expert in experts)
    second.load_state_dict(first.state_dict())
    for expert in experts:
        frozen = expert if whole else expert.body[0]
        frozen.requires_grad_(False)
    made = distil(experts, inputs, **FAST)
    assert torch.equal(made.body[0].weight, first.weight) != whole
    assert not made.body[0].weight.requires_grad
    assert made.head.weight.requires_grad != whole


def test_the_learning_rate_of_the_least_held_out_loss_is_taken_and_all_passes_are_counted(inputs):
    experts = [nn.Sequential(nn.Linear(6, 3)) for _ in range(2)]
    of_all = Experts(experts, calibration=inputs)
    options = {"steps": 6, "batch_size": 8, "start": "average"}
    made = coin.Distillation(learning_rates=[1e-4, 1e-1, 1e-2], **options).make(of_all, ROW)
    losses = made.chosen["held_out_loss"]
    assert list(losses) == ["0.0001", "0.1", "0.01"]
    assert made.chosen["lr"] == float(min(losses, key=losses.get))
    # The experts' answers to 60 samples; three trials on 48 and of 12 that are held out; the final run.
    assert of_all.passes == 2 * 60 + 3 * (6 * 8 * 3 + 12) + 6 * 8 * 3
    fixed = distil(experts, inputs, lr=made.chosen["lr"], **options)
    assert states_equal(made.network, fixed)


def test_the_code_row_is_as_exact_as_the_experts(inputs):
    """0.4 + 0.6 is not 1 in float32, by which identical experts in float64 were trained away from themselves."""
    expert = make_experts()[0].double().eval()
    doubles = [[batch.double() for batch in batches] for batches in inputs]
    made = distil([expert, deepcopy(expert)], doubles, lr=1e-2, steps=2, start="average")
    torch.testing.assert_close(made(doubles[0][0]), expert(doubles[0][0]), rtol=0, atol=1e-4)


IN_MEMORY = {
    "augmentation": (
        {**FAST, "augmentation": "shift"},
        ConfigurationError,
        "for batches in memory, taken as they are",
    ),
    "other samples": (
        {**FAST, "samples_per_task": 4},
        ConfigurationError,
        "for batches in memory, taken as they are",
    ),
    "too high a rate": (
        {"lr": 1e30, "steps": 5},
        NumericalError,
        "distillation diverged with lr=1e",
    ),
    "all too high": (
        {"learning_rates": [1e30], "steps": 5},
        NumericalError,
        r"diverged with every learning rate of \[1e\+30\]; give smaller ones",
    ),
}


@pytest.mark.parametrize("name", IN_MEMORY)
def test_what_memory_does_not_allow_is_told(name, inputs):
    options, error, message = IN_MEMORY[name]
    with pytest.raises(error, match=message):
        distil(make_experts(), inputs, **options)


def test_without_calibration_samples_nothing_is_trained():
    with pytest.raises(
        ConfigurationError, match="found no calibration inputs, which the merge needs"
    ):
        distil(make_experts(), None, lr=1e-3)


REFUSED = {
    "found lr=0.0, expected a number above 0": {"lr": 0.0},
    "found lr=nan, expected a number above 0": {"lr": float("nan")},
    "found samples_per_task=0, expected a whole number of at least 1": {"samples_per_task": 0},
    r"found learning_rates=\[\], expected at least one": {"learning_rates": []},
    "found learning_rates=-1.0, expected a number above 0": {"learning_rates": [1e-3, -1.0]},
    "found start='refined', expected one of auto, average, .*refit": {"start": "refined"},
    "found steps=0": {"steps": 0},
    "found seed=-1": {"seed": -1},
    "found batch_size=1, expected a whole number of at least 2": {"batch_size": 1},
    "found label 'a/b', expected a plain file name": {"label": "a/b"},
    "found label 'oracle'": {"label": "oracle"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_options_are_refused_at_construction(message):
    with pytest.raises(ConfigurationError, match=message):
        coin.Distillation(**REFUSED[message])
