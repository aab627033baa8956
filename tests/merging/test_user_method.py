"""Methods of the user's own: how they are called, what they cost, and what is said of what they do wrong."""

import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from coin.errors import ConfigurationError, StateError
from coin.merging import Experts, UserMethod

ROW = [0.25, 0.75]
MODULE = """
from copy import deepcopy
import torch
from torch import nn

def first(experts, calibration):
    with torch.no_grad():
        for parameter in experts[0].parameters():
            parameter.mul_(2)
    return experts[0].train()

def told(experts, calibration, row, initial, scale=1.0):
    made = deepcopy(initial)
    made[0].running_mean.fill_(row[0])
    made[0].running_var.fill_(len(calibration[1]) + sum(map(len, calibration[1])))
    with torch.no_grad():
        made[1].bias.fill_(scale).add_(torch.rand(()))
    return made

def broken(experts, calibration):
    return experts[2]

def nothing(experts, calibration):
    pass

def other(experts, calibration):
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(3, 3),)

def infinite_buffer(experts, calibration):
    experts[0][0].running_var[0] = float("nan")
    return experts[0]

none = first
number = 3
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """The user's module, in a folder that is looked at."""
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return path


def network():
    made = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    made[0].running_mean = torch.rand(4)
    return made


def experts():
    torch.manual_seed(0)
    samples = [[torch.randn(6, 4), torch.randn(2, 4)] for _ in ROW]
    return Experts([network(), network()], initial=network(), calibration=samples)


def test_it_gets_copies_that_it_may_change_and_its_network_is_taken_as_it_is():
    given = experts()
    before = deepcopy(given.networks[0].state_dict())
    made = UserMethod("mine.first").make(given, ROW).network
    assert not made.training
    for name, tensor in made.state_dict().items():
        assert torch.equal(given.networks[0].state_dict()[name], before[name])
        assert torch.equal(tensor, before[name] * (1 if "running" in name or "num" in name else 2))


def test_it_gets_what_its_parameters_ask_for_and_draws_the_same_numbers_every_time():
    method = UserMethod("mine.told", {"scale": 3.0})
    given = experts()
    assert method.reads_initial
    state = torch.get_rng_state()
    with torch.no_grad():
        made = method.make(given, ROW).network
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(made[1].weight, given.initial()[0]["1.weight"])
    assert (made[0].running_mean == ROW[0]).all()
    assert (made[0].running_var == 2 + 8).all()
    assert 3 < made[1].bias[0] < 4
    assert torch.equal(method.make(given, ROW).network[1].bias, made[1].bias)
    assert not UserMethod("mine.first").reads_initial


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (
            "mine.merge",
            {},
            r"'mine\.merge', expected the import path of a Python function \(module",
        ),
        ("mine.number", {}, r"expected a Python function .*\(3 is not a callable obj"),
        ("mine.none", {}, "found label 'none', expected a plain file name"),
        ("mine.first", {"scale": 1}, r"options \{'scale': 1\} \(got an unexpected keyword"),
        ("mine.told", {"row": [1]}, "multiple values for keyword argument 'row'"),
        ("textwrap.dedent", {}, "of experts and calibration .*too many positional arguments"),
        (3, {}, "found function '3', expected the import path of a Python function"),
    ],
)
def test_what_cannot_be_called_is_refused(function, options, message):
    with pytest.raises(ConfigurationError, match=message):
        UserMethod(function, options)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothing", ConfigurationError, r"^function 'mine\.nothing' returned a NoneType, expected"),
        (
            "other",
            StateError,
            r"^'the network that mine\.other returned' has a tensor '2\.\w+' too",
        ),
        ("infinite_buffer", StateError, r"method 'infinite_buffer' is not finite: tensor '0\.run"),
        ("broken", IndexError, "list index out of range"),  # its own error, with its traceback
    ],
)
def test_what_goes_wrong_is_told_in_one_line(name, error, message):
    with pytest.raises(error, match=message):
        UserMethod(f"mine.{name}").coded_model(experts(), ROW)


def test_its_key_is_of_the_source_that_was_read(mine, monkeypatch):
    before = UserMethod("mine.told")
    key = before.content_key()
    mine.write_text(MODULE + "\nCHANGED = True\n")
    assert before.content_key() == key
    monkeypatch.delitem(sys.modules, "mine")
    assert UserMethod("mine.told").content_key() != key


def test_a_function_is_taken_in_the_place_of_its_import_path():
    given = experts()

    def second(experts, calibration):
        return experts[1]

    method = UserMethod(second)
    assert (method.label, method.function) == ("second", f"{__name__}.second")
    made = method.make(given, ROW).network
    assert torch.equal(made[0].weight, given.networks[1][0].weight)
    assert UserMethod(lambda experts, calibration: experts[0]).label == "lambda"
