"""Statistics that library users save and load."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import coin
from coin.errors import ConfigurationError, FileError, StateError
from coin.files.safetensors import save_state
from coin.statistics import fisher_sums, gram_sums
from coin.statistics.files import open_statistics
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind

BATCHES = [torch.linspace(-1, 1, 192).view(6, 2, 4, 4).exp().sin()]


@pytest.fixture
def network():
    return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3))


def fisher(network):
    return coin.fisher_diagonal(network, BATCHES)


@pytest.mark.parametrize("pass_of", [fisher_sums, gram_sums])
def test_what_is_saved_is_loaded(network, tmp_path, pass_of):
    sums = pass_of(network, BATCHES)
    expected = sums.mean()
    statistic = "gram" if pass_of is gram_sums else "fisher"
    for saved in (sums, expected):
        coin.save_statistic(tmp_path / "file", saved, network, statistic=statistic)
        found = coin.load_statistic(str(tmp_path / "file"), network)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_it_is_of_these_weights_alone(network, tmp_path):
    coin.save_statistic(tmp_path / "file", fisher(network), network)
    with torch.no_grad():
        network[2].bias[0] += 1e-3
    with pytest.raises(
        FileError, match=r"is of weights \w{12}…, expected \w{12}…: the expert has changed since"
    ):
        coin.load_statistic(tmp_path / "file", network)


def test_a_merge_takes_them(network, tmp_path):
    experts = [network, deepcopy(network)]
    experts[1][0].weight.data *= 1.5
    code = coin.Code([[0.5, 0.5]])
    fishers = []
    for expert in experts:
        coin.save_statistic(tmp_path / "file", fisher(expert), expert)
        fishers.append(coin.load_statistic(tmp_path / "file", expert))
    (found,) = coin.merge_networks(coin.Coin(), experts, code, fishers=fishers)
    (expected,) = coin.merge_networks(
        coin.Coin(fisher_data="own"), experts, code, calibration=[BATCHES] * 2
    )
    assert torch.equal(found[0].weight, expected[0].weight)


UNFIT = {
    "another's tensor": ("fisher", {"tail": torch.ones(2)}, "'tail', which Sequential has not"),
    "a shape": (
        "fisher",
        {"2.bias": torch.ones(2)},
        r"'2\.bias' of \[2\], expected \[3\] of a fisher",
    ),
    "a sign": ("fisher", {"2.bias": -torch.ones(3)}, r"the statistic is negative in '2\.bias'"),
    "NaN": ("fisher", {"2.bias": torch.full((3,), torch.nan)}, r"not finite: tensor '2\.bias'"),
    "no matrices": ("gram", {"0.bias": torch.ones(4)}, r"\[4\], expected \[4, 4, 4\] of a gram"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_the_network_is_not_saved(network, tmp_path, name):
    statistic, values, message = UNFIT[name]
    with pytest.raises(StateError, match=message):
        coin.save_statistic(tmp_path / "file", values, network, statistic=statistic)


def test_what_is_no_statistic_is_not_loaded(network, tmp_path):
    save_state(tmp_path / "file", network.state_dict(), {"made_by": "a test"})
    with pytest.raises(FileError, match="holds no statistic, expected fisher or gram"):
        coin.load_statistic(tmp_path / "file", network)
    with pytest.raises(FileError, match="found no file"):
        coin.load_statistic(tmp_path / "none", network)


def test_an_expert_without_the_statistic_is_named():
    which = Statistic(StatisticKind.gram, DataChoice.own)
    with pytest.raises(ConfigurationError, match=r"no Gram matrices \(own\) of expert 'digits'"):
        open_statistics({which: {}}, which, {"digits": "0"})
