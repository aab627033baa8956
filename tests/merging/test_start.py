"""Methods that go on from another one's coded model."""

import pytest
import torch
from torch import nn

from coin.errors import ConfigurationError
from coin.merging import Average, Coin, Experts, HeadFit, Refit, Target
from coin.merging.method import starting_method
from coin.statistics.statistic import DataChoice

ROW = (0.4, 0.6)


@pytest.mark.parametrize(
    ("start", "kind", "options"),
    [
        ("average", Average, {}),
        ("coin", Coin, {}),
        ("refit", Refit, {"target": Target.auto}),
        ({"class_path": "Refit", "init_args": {"target": "own", "ridge": None}}, Refit, {"target": Target.own}),
        ({"class_path": "coin.merging.Average", "init_args": {"batchnorm": "recalibrate"}}, Average, {}),
        ({"class_path": "HeadFit", "init_args": None}, HeadFit, {}),
    ],
)
def test_a_start_is_a_closed_form_by_its_name_or_by_its_class(start, kind, options):
    class Special(Average):  # a variant does not take its base's name
        pass

    assert type(starting_method({"class_path": "Special"})) is not Average
    method = starting_method(start)
    assert type(method) is kind
    assert {name: getattr(method, name) for name in options} == options


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("refined", r"^found start='refined', expected one of average, coin, head_fit, "),
        ("ties", "found start='ties', expected"),  # needs the shared initialisation
        ("distillation", "found start='distillation', expected"),
        ({"class_path": "UserMethod", "init_args": {"function": "mine.merge"}}, "found start=.*, expected one of ave"),
        (3, "found start=3, expected one of average"),
        ({"class": "Refit"}, r"found start=\{'class': 'Refit'\}, expected one of"),
        ({"class_path": "Refit", "init_args": {"goal": "own"}}, "expected options of Refit .*unexpected.*'goal'"),
        ({"class_path": "Refit", "init_args": {"target": "all"}}, "found target='all', expected one of own, both"),
    ],
)
def test_what_cannot_be_a_start_is_refused(start, message):
    with pytest.raises(ConfigurationError, match=message):
        starting_method(start)


def test_without_held_out_leaves_every_tasks_last_samples_out():
    experts = Experts([nn.Linear(4, 3)] * 2, calibration=[torch.randn(60, 4).split(20) for _ in ROW])
    fitted = Experts(experts.networks, calibration=experts.fitted(DataChoice.own))
    assert [sum(map(len, each)) for each in fitted.samples("own")] == [48, 48]
    assert torch.equal(torch.cat(list(fitted.pooled)), torch.cat(list(experts.split[0])))
