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
from coin.errors import ConfigurationError, NumericalError, StateError
from coin.files.tensors import fingerprint
from coin.merging import Experts, HeadFit
from coin.merging.expert_sources import ExpertFiles
from coin.modules import DistillationModule
from coin.pipeline.steps.merge import Training

ROW = [0.4, 0.6]
FAST = {"lr": 1e-2, "steps": 40, "batch_size": 8}
STILL = {"lr": 1e-12, "steps": 1, "batch_size": 8, "augmentation": "none"}  # which moves nothing


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh())
        self.head = nn.Linear(8, 3, bias=bias)

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
    samples = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(5))
    return [own.split(8) for own in samples]


def merged(method, experts, inputs):
    (made,) = coin.merge_networks(method, experts, [ROW], calibration=inputs)
    return made


def distil(experts, inputs, **options):
    return merged(coin.Distillation(**options), experts, inputs)


def mark_of(network):
    return fingerprint(network.state_dict())


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
    expected = merged(STARTS[start], experts, inputs)
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


def test_experts_in_files_are_distilled_on_as_many_augmented_samples_as_requested(
    write_experts, tasks_of, tmp_path
):
    data = tasks_of([3, 2])
    data.setup()
    paths = {task: Path(path) for task, path in write_experts([3, 2]).items()}
    experts = Experts(ExpertFiles(paths), train=Training(data, tmp_path, 0))
    method = coin.Distillation(lr=1e-3, steps=3, batch_size=8, samples_per_task=10, start="average")
    made = method.make(experts, ROW)
    # Both BatchNorm policies on 4 held-out samples and 20 to recalibrate, the experts' answers to the 4 among them.
    start_passes = 2 * 4 + 4 + (4 + 16)
    assert experts.passes == start_passes + 3 * 8 * (3 + 2)
    calibration = experts.train.calibration(method)
    start = merged(coin.Average(), experts.networks, calibration)
    assert mark_of(made.network) != mark_of(start)


class InPlace(nn.Linear):
    """Changes its inputs."""

    def forward(self, x):
        return super().forward(x.sub_(1))


@pytest.fixture
def train(make_trainer):
    """Return a function that trains a small student of two teachers on 16 samples, and returns module and Trainer."""

    def run(targets=None, **options):
        torch.manual_seed(0)
        samples = torch.randn(16, 4)
        teachers = [InPlace(4, 3), InPlace(4, 3)]
        student = nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval()
        if targets == "told":
            targets = mixed(teachers, samples)
        module = DistillationModule(student, teachers, ROW, lr=1e-2, steps=4, targets=targets)
        trainer = make_trainer(max_steps=4, max_epochs=-1, **options)
        data = Batches(Calibration.of([samples]), 8, trainer, 0, Augmentation.none)
        trainer.fit(module, data)
        return module, trainer

    return run


def mixed(networks, samples):
    """Return 0.4 f_1 + 0.6 f_2."""
    with torch.no_grad():
        first, second = (deepcopy(network).eval()(samples.clone()) for network in networks)
    return 0.4 * first + 0.6 * second


def test_teachers_run_on_copies_of_what_the_student_gets(train):
    asked, _ = train()
    told, _ = train("told")
    torch.testing.assert_close(asked.student.state_dict(), told.student.state_dict())
    assert (asked.passes, told.passes) == (4 * 8 * (3 + 2), 4 * 8 * 3)
    assert not any(inner.training for inner in asked.train().student.modules())


def test_losses_are_in_float32_where_networks_run_in_bf16(train):
    module, trainer = train(precision="bf16-mixed")
    assert trainer.callback_metrics["train/loss"].dtype == torch.float32
    assert {parameter.dtype for parameter in module.student.parameters()} == {torch.float32}


def test_it_comes_nearer_than_its_start(inputs):
    experts = make_experts()
    start = merged(coin.Average(), experts, inputs)
    made = distil(experts, inputs, lr=1e-2, steps=100, start="average", batch_size=32)
    samples = torch.cat([*inputs[0], *inputs[1]])
    ideal = mixed(experts, samples)
    loss, loss_before = (
        float((mixed([network, network], samples) - ideal).square().mean())
        for network in (made, start)
    )
    assert loss < 0.2 * loss_before
    torch.testing.assert_close(
        dict(made.named_buffers()), dict(start.named_buffers()), rtol=0, atol=0
    )
    assert not any(module.training for module in made.modules())
    assert all(parameter.grad is None for parameter in made.parameters())


def test_experts_random_numbers_and_loggers_are_left_as_found(inputs, capfd, caplog, recwarn):
    experts = make_experts()
    marks = [mark_of(expert) for expert in experts]
    modes = [module.training for expert in experts for module in expert.modules()]
    state = torch.get_rng_state()
    level = logging.getLogger("lightning.pytorch").level
    distil(experts, inputs, **FAST)
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger("lightning.pytorch").level == level
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not [warning for warning in recwarn if "lightning" in str(warning.filename)]
    assert [mark_of(expert) for expert in experts] == marks
    assert [module.training for expert in experts for module in expert.modules()] == modes
    for expert in experts:
        assert all(each.requires_grad and each.grad is None for each in expert.parameters())


def test_a_seed_gives_the_same_network_in_any_context(inputs):
    expected = distil(make_experts(), inputs, **FAST)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        experts = make_experts()
        torch.manual_seed(99)
        with context():
            found = distil(experts, inputs, **FAST, seed=0)
        assert mark_of(found) == mark_of(expected)
    assert mark_of(distil(make_experts(), inputs, **FAST, seed=3)) != mark_of(expected)


def test_batches_by_name_train_as_well(inputs):
    named = [[{"x": batch} for batch in batches] for batches in inputs]
    found = distil(make_experts(Named), named, **FAST)
    assert type(found) is Named
    assert mark_of(found) == mark_of(distil(make_experts(), inputs, **FAST))


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


OF_LINEAR = {"steps": 6, "batch_size": 8, "start": "average"}


@pytest.fixture
def linear(inputs):
    """Two linear experts with their samples."""
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(6, 3)) for _ in range(2)]
    return Experts(experts, calibration=inputs)


def test_the_learning_rate_of_the_least_held_out_loss_is_taken_and_all_passes_are_counted(
    linear, inputs
):
    method = coin.Distillation(learning_rates=[1e-4, 1e-1, 1e-2], **OF_LINEAR)
    made = method.make(linear, ROW)
    losses = made.chosen["held_out_loss"]
    assert list(losses) == ["0.0001", "0.1", "0.01"]
    assert made.chosen["lr"] == float(min(losses, key=losses.get))
    # The experts' answers to 60 samples; three trials on 48 and of 12 that are held out; the final run.
    assert linear.passes == 2 * 60 + 3 * (6 * 8 * 3 + 12) + 6 * 8 * 3
    fixed = distil(linear.networks, inputs, lr=made.chosen["lr"], **OF_LINEAR)
    assert mark_of(made.network) == mark_of(fixed)


def test_the_held_out_loss_is_half_the_squared_distance_on_samples_that_are_left_out(inputs):
    experts = make_experts()
    of_all = Experts(experts, calibration=inputs)
    still = coin.Distillation(learning_rates=[1e-12], steps=1, batch_size=8, start="average")
    losses = still.make(of_all, ROW).chosen["held_out_loss"]
    _, held_out = of_all.split
    samples = held_out.inputs()
    start = merged(coin.Average(batchnorm="average"), experts, inputs)
    error = mixed([start, start], samples) - mixed(experts, samples)
    expected = 0.5 * np.square(error.numpy()).sum(1).mean()
    assert losses == {"1e-12": pytest.approx(expected, rel=1e-5)}


def test_the_code_row_is_as_exact_as_the_experts(inputs):
    """0.4 + 0.6 is not 1 in float32, by which identical experts in float64 were trained away from themselves."""
    expert = make_experts()[0].double().eval()
    doubles = [[batch.double() for batch in batches] for batches in inputs]
    made = distil([expert, deepcopy(expert)], doubles, lr=1e-2, steps=2, start="average")
    torch.testing.assert_close(made(doubles[0][0]), expert(doubles[0][0]), rtol=0, atol=1e-4)


MEMORY = "for batches in memory, taken as they are"
IN_MEMORY = {
    "augmentation": (ConfigurationError, MEMORY, {"augmentation": "shift"}),
    "other samples": (ConfigurationError, MEMORY, {"samples_per_task": 4}),
    "too high a rate": (NumericalError, "diverged with lr=1e", {"lr": 1e30, "steps": 5}),
    "all too high": (
        NumericalError,
        r"diverged with every learning rate of \[1e\+30\]; give smaller ones",
        {"learning_rates": [1e30], "steps": 5},
    ),
}


@pytest.mark.parametrize("name", IN_MEMORY)
def test_what_memory_does_not_allow_is_told(name, inputs):
    error, message, options = IN_MEMORY[name]
    with pytest.raises(error, match=message):
        distil(make_experts(), inputs, **options)


def test_without_calibration_samples_nothing_is_trained():
    message = "found no calibration inputs, which the merge needs"
    with pytest.raises(ConfigurationError, match=message):
        distil(make_experts(), None, lr=1e-3)


REFUSED = {
    "found lr=0.0, expected a number above 0": {"lr": 0.0},
    "found samples_per_task=0, expected a whole number of at least 1": {"samples_per_task": 0},
    r"found learning_rates=\[\], expected at least one": {"learning_rates": []},
    "found learning_rates=-1.0, expected a number above 0": {"learning_rates": [1e-3, -1.0]},
    "found start='refined', expected one of auto, average, .*refit": {"start": "refined"},
    "found steps=0": {"steps": 0},
    "found seed=-1": {"seed": -1},
    "found batch_size=1, expected a whole number of at least 2": {"batch_size": 1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_options_are_refused_at_construction(message):
    with pytest.raises(ConfigurationError, match=message):
        coin.Distillation(**REFUSED[message])
