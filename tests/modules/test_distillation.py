import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coin.data.tasks import Tasks
from coin.distillation import Distillation
from coin.errors import ConfigurationError, HeadError, StateError
from coin.merging import Experts, Refit, average
from coin.merging.closed_form import MergeMethod
from coin.merging.expert_sources import ExpertFiles
from coin.networks import NetworkConfig, build_network, load_network, pad_head, save_network

ROW = [0.25, 0.75]
PLAIN = {"start": "average", "augmentation": "none"}


@pytest.fixture
def experts(write_experts):
    return list(write_experts([3, 2]).values())


@pytest.fixture
def tasks(synthetic):
    """Return a function that makes the experts' tasks, with a share of the calibration samples held out."""

    def make(held_out=0.0):
        members = {"a": synthetic(3, key=1), "b": synthetic(2, key=2)}
        return Tasks(members, samples_per_task=20, batch_size=8, held_out=held_out)

    return make


def module_of(experts, row=ROW, **options):
    source = ExpertFiles({path: Path(path) for path in experts})
    teachers = nn.ModuleList(source.each_network())
    return Distillation(**options).module(row, source.empty_model().eval(), teachers)


def begun(experts, data, make_trainer, **options):
    """A module before its first step, which moves nothing."""
    module = module_of(experts, lr=1e-12, steps=1, **options)
    make_trainer(max_steps=1, max_epochs=-1).fit(module, datamodule=data)
    return module


def test_the_student_starts_from_the_weighted_average_or_that_with_its_head_fitted(
    experts, tasks, make_trainer, monkeypatch
):
    plain = begun(experts, tasks(), make_trainer, start="average")
    averaged = plain.student.state_dict()
    first, second = (dict(pad_head(load_network(Path(path)).network, 3).named_parameters()) for path in experts)
    for name in first:
        torch.testing.assert_close(averaged[name], 0.25 * first[name] + 0.75 * second[name])
    fitted = begun(experts, tasks(), make_trainer)
    assert fitted.chosen["start"] == "head_fit"
    for name, tensor in fitted.student.state_dict().items():
        assert torch.allclose(averaged[name].float(), tensor.float(), atol=1e-6) != name.startswith("fc."), name

    def refuse(*_, **__):
        raise HeadError("found a head 'conv' of type Conv2d")

    monkeypatch.setattr(average, "fit_head", refuse)
    module = begun(experts, tasks(), make_trainer)
    assert module.chosen["start"] == "average"
    assert all(torch.equal(tensor, plain.begun[name]) for name, tensor in module.begun.items())
    with pytest.raises(StateError, match="found a head 'conv'"):
        begun(experts, tasks(), make_trainer, start="head_fit")


def test_experts_answer_with_padded_logits_and_all_networks_stay_in_eval_mode(experts):
    module = module_of(experts)
    inputs = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first, second = (load_network(Path(path)).network(inputs) for path in experts)
    before = inputs.clone()
    for teacher in module.teachers:  # which changes its inputs, once it has its own copy
        teacher.register_forward_pre_hook(lambda network, own: (own[0].clone(), own[0].sub_(1))[:1], prepend=True)
    torch.testing.assert_close(module.expert_outputs(inputs), torch.stack([first, F.pad(second, (0, 1))]))
    assert torch.equal(inputs, before)
    assert module.train().training
    assert not any(inner.training for network in [module.student, *module.teachers] for inner in network.modules())


def test_it_goes_on_from_a_refit(experts, tasks, make_trainer):
    module, data = module_of(experts, lr=1e-12, steps=1, start="refit"), tasks()
    make_trainer(max_steps=1, max_epochs=-1).fit(module, datamodule=data)
    samples, _ = data.fitted_and_held_out()
    parts = [samples.subset((samples.part == task).nonzero().flatten()) for task in range(2)]
    expected = Refit().coded_model(Experts(list(module.teachers), calibration=parts), ROW)
    for name, tensor in expected.network.state_dict().items():
        torch.testing.assert_close(module.begun[name], tensor, rtol=1e-5, atol=1e-6)
    assert module.chosen["start"] == "refit"


def start_passes(samples, held_out, *, head_fit):
    """Both BatchNorm policies on the held-out samples, recalibrated on the others; then what fitting the head takes."""
    fitted = samples - held_out
    choice = 2 * held_out + held_out + (fitted + held_out)
    return choice + (2 * fitted + samples if head_fit else 0)


@pytest.mark.parametrize("recalibrated", [False, True])
@pytest.mark.slow
def test_passes_count_forward_equivalents(experts, tasks, make_trainer, recalibrated, monkeypatch):
    """The start takes the policy with the smaller residual, and one more pass of all samples to recalibrate."""
    measured = MergeMethod._held_out_residuals

    def given(method, experts, row, parameters, policies):
        measured(method, experts, row, parameters, policies)
        return {policy: float((policy == "recalibrate") != recalibrated) for policy in policies}

    monkeypatch.setattr(MergeMethod, "_held_out_residuals", given)
    module = module_of(experts, lr=1e-3, **PLAIN)
    make_trainer(max_epochs=3).fit(module, datamodule=tasks())
    assert module.passes == start_passes(40, 8, head_fit=False) + 40 * recalibrated + 40 * 2 + 3 * (3 * 40)
    assert math.isinf(module.held_out_loss)
    module = module_of(experts, lr=1e-3, **PLAIN)
    make_trainer(max_epochs=3).fit(module, datamodule=tasks(held_out=0.2))
    start = start_passes(32, 6, head_fit=False) + 32 * recalibrated
    assert module.passes == start + 32 * 2 + 3 * (3 * 32) + 3 * 8 + 8 * 2
    module = module_of(experts, lr=1e-3, steps=7)
    make_trainer(max_steps=7, max_epochs=-1).fit(module, datamodule=tasks())
    assert module.passes == start_passes(40, 8, head_fit=True) + 40 * recalibrated + 7 * 8 * (3 + 2)


def test_the_held_out_loss_is_of_samples_that_training_leaves_out(experts, tasks, make_trainer):
    module, data = module_of(experts, lr=1e-3), tasks(held_out=0.2)
    make_trainer(max_epochs=2).fit(module, datamodule=data)
    inputs = data.calibration().split(0.2)[1].inputs()
    with torch.no_grad():
        target = torch.tensordot(torch.tensor(ROW), module.expert_outputs(inputs), dims=1)
        loss = 0.5 * (module.student(inputs) - target).square().sum(1).mean()
    assert module.held_out_loss == pytest.approx(float(loss), rel=1e-5)


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


def test_what_is_missing_or_does_not_fit_is_named(experts, tasks, synthetic, make_trainer, tmp_path):
    with pytest.raises(ConfigurationError, match="found data of Synthetic, expected Tasks"):
        make_trainer(max_epochs=1).fit(module_of(experts, lr=1e-3), datamodule=synthetic())
    config = NetworkConfig("small_resnet", 16, None, {"width": 8})
    save_network(tmp_path / "other.safetensors", build_network(config, 3), config, 3, {})
    with pytest.raises(StateError, match=r"'expert 1' has tensor '[\w.]+' of shape \[8, 3, 3, 3\], expected \[4, "):
        begun([experts[0], str(tmp_path / "other.safetensors")], tasks(), make_trainer)
