"""Methods that go on from another one's coded model."""

import pytest
import torch
from torch import nn

from coin.data import pooled
from coin.errors import ConfigurationError
from coin.merging import Average, Coin, Experts, HeadFit, Refit, Target
from coin.merging.method import starting_method
from coin.statistics.statistic import DataChoice

ROW = (0.4, 0.6)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
    )


def setup():
    draw = torch.Generator().manual_seed(3)
    networks = []
    for seed in range(2):
        torch.manual_seed(seed)
        each = network().double().eval()
        for buffer in (each[1].running_mean, each[1].running_var):
            buffer += torch.rand(4, generator=draw, dtype=torch.float64)
        networks.append(each)
    return Experts(networks, calibration=[torch.randn(60, 2, 4, 4, generator=draw).double().split(20) for _ in ROW])


@pytest.mark.parametrize(
    ("start", "kind", "options"),
    [
        ("average", Average, {}),
        ("coin", Coin, {}),
        ("head_fit", HeadFit, {}),
        ("refit", Refit, {"target": Target.auto}),
        ({"class_path": "Refit", "init_args": {"target": "own", "ridge": None}}, Refit, {"target": Target.own}),
        ({"class_path": "coin.merging.Average", "init_args": {"batchnorm": "recalibrate"}}, Average, {}),
        ({"class_path": "HeadFit", "init_args": None}, HeadFit, {}),
    ],
)
def test_a_start_is_a_closed_form_by_its_name_or_by_its_class(start, kind, options):
    method = starting_method(start)
    assert type(method) is kind
    assert {name: getattr(method, name) for name in options} == options


def test_a_variant_that_somebody_has_made_of_a_method_does_not_take_its_name():
    class Special(Average):
        def __init__(self, share):
            super().__init__()
            self.share = share

    assert type(starting_method("average")) is Average
    made = starting_method({"class_path": "Special", "init_args": {"share": 0.5}})
    assert type(made) is Special
    assert made.share == 0.5


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("refined", r"^found start='refined', expected one of average, coin, head_fit, "),
        ("ties", "found start='ties', expected"),  # needs the shared initialisation
        ("distillation", "found start='distillation', expected"),
        (
            {"class_path": "UserMethod", "init_args": {"function": "mine.merge"}},
            "found start=.*, expected one of average",
        ),
        ({"class_path": "Refitted"}, r"found start=\{'class_path': 'Refitted'\}, expected one of"),
        (3, "found start=3, expected one of average"),
        ({"class": "Refit"}, r"found start=\{'class': 'Refit'\}, expected one of"),
        ({"class_path": "Refit", "init_args": {"goal": "own"}}, "expected options of Refit .*unexpected.*'goal'"),
        (
            {"class_path": "Refit", "init_args": {"target": "all"}},
            "found target='all', expected one of own, both, auto",
        ),
    ],
)
def test_what_cannot_be_a_start_is_refused(start, message):
    with pytest.raises(ConfigurationError, match=message):
        starting_method(start)


def test_without_held_out_leaves_every_tasks_last_samples_out():
    experts = setup()
    fitted = Experts(experts.networks, calibration=experts.fitted(DataChoice.own))
    assert [sum(map(len, each)) for each in fitted.samples("own")] == [48, 48]
    assert torch.equal(torch.cat(list(fitted.pooled)), torch.cat(list(experts.split[0])))


def test_samples_of_a_calibration_of_several_parts_belong_to_its_task(synthetic):
    """As those of a training have, which is a share of all tasks' samples: choices were made on one task's alone."""
    parts = [synthetic(2, key=key).calibration(10) for key in (1, 2)]
    both = pooled(parts)
    tasks = [both.subset((both.part == task).nonzero().flatten()) for task in range(2)]
    experts = Experts([nn.Linear(1, 1)] * 2, calibration=tasks)
    assert experts.tasks.tolist() == [0, 1] * 10
    for task, fitted in enumerate(experts.fitted("own")):
        assert torch.equal(fitted.inputs(), parts[task].inputs()[: fitted.num_samples])
        assert fitted.num_samples == 8
