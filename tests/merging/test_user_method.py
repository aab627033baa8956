"""Methods of the user's own: how they are called, what they cost, and what is said of what they do wrong."""

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from coin.errors import CoinError, ConfigurationError
from coin.merging import Average, Experts, UserMethod
from coin.merging.expert_sources import ExpertFiles
from coin.networks import NetworkConfig, build_network, save_network
from coin.pipeline.options import config_dict

EXAMPLES = ("iso_c", "tsv_m")
ROOT = Path(__file__).parents[2]
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

def passes(experts, calibration):
    student = deepcopy(experts[0])
    with torch.no_grad():
        experts[1](calibration[0][0])
    student(calibration[0][0]).sum().backward()
    return student

def broken(experts, calibration):
    return experts[2]

def nothing(experts, calibration):
    pass

def other(experts, calibration):
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(3, 3))

def infinite_buffer(experts, calibration):
    experts[0][0].running_var[0] = float("nan")
    return experts[0]

def tensor(tensors, row, initial, name, layer, scale=1.0):
    assert name.rpartition(".")[0] != "fc"
    tensors[0].mul_(row[0]).add_(row[1] * tensors[1])
    scaled = isinstance(layer, nn.BatchNorm2d) and name == "stem.1.weight"
    return initial.add_(scale * tensors[0]) if scaled else tensors[0]

def named(tensors, row, name):
    assert name == "k"
    return row[0] * tensors[0] + row[1] * tensors[1]

def no_tensor(tensors):
    return tensors

none = first
number = 3
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's module, in a folder that is looked at."""
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return path


def network() -> nn.Sequential:
    made = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    made[0].running_mean = torch.rand(4)
    return made


def experts() -> Experts:
    torch.manual_seed(0)
    samples = [[torch.randn(6, 4), torch.randn(2, 4)] for _ in ROW]
    return Experts([network(), network()], initial=network(), calibration=samples)


def test_it_gets_copies_that_it_may_change_and_its_network_is_taken_as_it_is() -> None:
    given = experts()
    before = deepcopy(given.networks[0].state_dict())
    made = UserMethod("mine.first").make(given, ROW).network
    assert not made.training
    for name, tensor in made.state_dict().items():
        assert torch.equal(given.networks[0].state_dict()[name], before[name])
        assert torch.equal(tensor, before[name] * (1 if "running" in name or "num" in name else 2))


def test_it_gets_what_its_parameters_ask_for_and_draws_the_same_numbers_every_time() -> None:
    method, given = UserMethod("mine.told", {"scale": 3.0}), experts()
    assert method.reads_initial
    state = torch.get_rng_state()
    with torch.no_grad():
        made = method.make(given, ROW).network
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(made[1].weight, given.source.initial[1].weight)  # type: ignore[index]
    assert (made[0].running_mean == ROW[0]).all()
    assert (made[0].running_var == 2 + 8).all()
    assert 3 < made[1].bias[0] < 4
    assert torch.equal(method.make(given, ROW).network[1].bias, made[1].bias)
    assert not UserMethod("mine.first").reads_initial


def test_passes_through_experts_and_their_copies_are_counted() -> None:
    given = experts()
    network = UserMethod("mine.passes").make(given, ROW).network
    assert given.passes == 6 + 6
    network(torch.zeros(5, 4)).sum().backward()
    assert given.passes == 12


@pytest.mark.parametrize("in_files", [False, True])
def test_a_function_of_tensors_gets_one_of_every_expert_at_a_time(in_files: bool, tmp_path: Path) -> None:
    config, classes = NetworkConfig("small_resnet", 8, options={"width": 2}), (3, 5)
    networks = [build_network(config, count, seed=seed).eval() for seed, count in enumerate(classes)]
    initial = build_network(config, 5, seed=9).eval()
    networks[1].get_buffer("stem.1.running_mean").fill_(1)
    networks[1].get_buffer("stem.1.num_batches_tracked").fill_(7)
    start = deepcopy(initial.state_dict())
    paths = {"initial": initial} | {f"task{index}": network for index, network in enumerate(networks)}
    for name, each in paths.items():
        save_network(tmp_path / f"{name}.safetensors", each, config, each.fc.out_features, {})  # type: ignore[union-attr, arg-type]
    files = {name: tmp_path / f"{name}.safetensors" for name in paths}
    stored = ExpertFiles({name: files[name] for name in ("task0", "task1")}, files["initial"])
    given = Experts(stored) if in_files else Experts(networks, initial=initial)
    made = UserMethod("mine.tensor", {"scale": 3.0}).make(given, ROW).network.state_dict()
    average = Average(batchnorm="average").make(given, ROW).network.state_dict()  # type: ignore[arg-type]
    assert torch.equal(given.networks[0].state_dict()["stem.1.weight"], networks[0].state_dict()["stem.1.weight"])
    average["stem.1.weight"] = 3 * average["stem.1.weight"] + start["stem.1.weight"]
    assert torch.equal(initial.state_dict()["stem.1.weight"], start["stem.1.weight"])
    for name, tensor in average.items():
        torch.testing.assert_close(made[name], tensor, msg=name)
    assert len(made["fc.weight"]) == 5


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.head = nn.Parameter(torch.randn(3)), nn.Linear(4, 2)
        self.register_buffer("mask", torch.full((3,), -torch.inf), persistent=False)


def test_a_function_of_tensors_gets_no_masks() -> None:
    given = Experts([Odd().eval(), Odd().eval()])
    made: Any = UserMethod("mine.named").make(given, ROW).network
    torch.testing.assert_close(made.k, 0.25 * given.networks[0].k + 0.75 * given.networks[1].k)
    assert made.mask.isinf().all()


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("mine.merge", {}, r"found function 'mine\.merge', expected the import path of a Python function \(module"),
        ("mine.number", {}, r"found function 'mine\.number', expected a Python function .*\(3 is not a callable obj"),
        ("mine.none", {}, "found label 'none', expected a plain file name: .* not none or oracle"),
        ("mine.first", {"scale": 1}, r"takes the options \{'scale': 1\} \(got an unexpected keyword argument 'sc"),
        ("mine.told", {"row": [1]}, "multiple values for keyword argument 'row'"),
        ("textwrap.dedent", {}, "of experts and calibration, or .*too many positional arguments"),
        (3, {}, "found function '3', expected the import path of a Python function"),
    ],
)
def test_what_cannot_be_called_is_refused(function: Any, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        UserMethod(function, options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"^function 'mine\.nothing' returned a NoneType, expected a network like the experts"),
        ("other", r"^'the network that mine\.other returned' has a tensor '2\.\w+' too many \(2 in all\)"),
        ("no_tensor", r"^function 'mine\.no_tensor' returned list for '0\.weight', expected a tensor of shape \[4\]"),
        ("infinite_buffer", r"^the coded model of method 'infinite_buffer' is not finite: tensor '0\.running_var'"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line(name: str, message: str) -> None:
    with pytest.raises(CoinError, match=message):
        UserMethod(f"mine.{name}").coded_model(experts(), ROW)
    with pytest.raises(IndexError, match="list index out of range"):  # its own error, with its traceback
        UserMethod("mine.broken").make(experts(), ROW)


def test_the_examples_do_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    given = experts()
    average = Average(batchnorm="average").make(given, ROW).network  # type: ignore[arg-type]
    plain = UserMethod("notebooks.foreign_methods.dare", {"drop": 0.0}).make(given, ROW).network
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, average.state_dict()[name])
    dropped = UserMethod("notebooks.foreign_methods.dare", {"drop": 0.9}).make(given, ROW).network
    assert (dropped[1].weight == given.source.initial[1].weight).float().mean() > 0.5  # type: ignore[index, union-attr]
    assert given.passes == 0
    UserMethod("notebooks.foreign_methods.distil", {"steps": 2, "batch_size": 16}).make(given, ROW)
    assert given.passes == 2 * 16 + 2 * 16


def test_the_singular_vector_examples_are_their_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    torch.manual_seed(0)
    initial = nn.Sequential(nn.Conv2d(3, 6, 2), nn.Conv2d(6, 6, 1, groups=6), nn.Flatten(), nn.Linear(6, 4)).double()
    networks = [deepcopy(initial) for _ in range(2)]
    for network in networks:
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    given = Experts(networks, initial=initial, calibration=[[torch.randn(4, 3, 2, 2).double()]] * 2)
    steps = [(network[0].weight - initial[0].weight).detach().flatten(1) for network in networks]
    made = {name: UserMethod(f"notebooks.foreign_methods.{name}").make(given, (0.5, 0.5)).network for name in EXAMPLES}
    averaged = Average().make(given, (0.5, 0.5)).network
    found = {name: (network[0].weight - initial[0].weight).detach().flatten(1) for name, network in made.items()}
    for network in made.values():
        for name, tensor in averaged.named_parameters():  # vectors, depthwise kernels and the head
            assert torch.equal(network.get_parameter(name), tensor) == (name != "0.weight"), name
    whole = torch.linalg.svdvals(sum(steps))
    torch.testing.assert_close(torch.linalg.svdvals(found["iso_c"]), whole.mean().expand(6))
    products = torch.linalg.svdvals(found["iso_c"].T @ sum(steps))  # of the same singular vectors
    torch.testing.assert_close(products[:6], whole * whole.mean())
    parts = [torch.linalg.svd(step, full_matrices=False) for step in steps]
    kept = torch.cat([s[:3] for _, s, _ in parts])  # 6 // 2 of each
    torch.testing.assert_close(torch.linalg.svdvals(found["tsv_m"]), kept.sort(descending=True).values)


def test_its_key_is_of_the_source_that_was_read(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = UserMethod("mine.told")
    key = before.content_key()
    mine.write_text(MODULE + "\n# changed\n")
    assert before.content_key() == key
    monkeypatch.delitem(sys.modules, "mine")
    assert UserMethod("mine.told").content_key() != key


def test_a_function_is_taken_in_the_place_of_its_import_path() -> None:
    given = experts()

    def second(tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[1]

    method = UserMethod(second)  # type: ignore[arg-type]
    assert (method.label, method.function) == ("second", f"{__name__}.second")
    made = method.make(given, ROW).network
    assert torch.equal(made[0].weight, given.networks[1][0].weight)
    assert UserMethod(lambda experts, calibration: experts[0]).label == "lambda"  # type: ignore[arg-type]
    named = UserMethod("mine.told", {"scale": 2.0})
    told = {"class": "UserMethod", "function": "mine.told", "options": {"scale": 2.0}, "label": "told", "compress": []}
    assert config_dict(named).items() >= told.items()
