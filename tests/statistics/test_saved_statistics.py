"""Statistics that library users save and load."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import coin
from coin.errors import FileError, StateError
from coin.files.safetensors import save_state


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3))


BATCHES = [torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1))]


def test_what_is_saved_for_a_network_is_loaded_for_it_alone(network: nn.Module, tmp_path: Path) -> None:
    sums = coin.gram_sums(network, BATCHES)
    fisher = coin.fisher_diagonal(network, BATCHES)
    for values, statistic in ((fisher, "fisher"), (sums.mean(), "gram"), (sums, "gram")):
        coin.save_statistic(tmp_path / "statistic", values, network, statistic=statistic)
        found = coin.load_statistic(str(tmp_path / "statistic"), network)
        expected = sums.mean() if values is sums else values
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        other = deepcopy(network)
        with torch.no_grad():
            other[2].bias[0] += 1e-3
        with pytest.raises(FileError, match=r"is of weights \w{12}…, expected \w{12}…: the expert has changed since"):
            coin.load_statistic(tmp_path / "statistic", other)


def test_a_merge_takes_them(network: nn.Module, tmp_path: Path) -> None:
    experts, code = [network, deepcopy(network)], coin.Code([[0.5, 0.5]])
    with torch.no_grad():
        experts[1][0].weight.mul_(1.5)
    for index, expert in enumerate(experts):
        coin.save_statistic(tmp_path / f"{index}", coin.fisher_diagonal(expert, BATCHES), expert)
    fishers = [coin.load_statistic(tmp_path / f"{index}", expert) for index, expert in enumerate(experts)]
    (found,) = coin.merge_networks(coin.Coin(), experts, code, fishers=fishers)
    (expected,) = coin.merge_networks(coin.Coin(fisher_data="own"), experts, code, calibration=[BATCHES] * 2)
    assert torch.equal(found[0].weight, expected[0].weight)


def test_what_is_no_statistic_of_the_network_is_refused(network: nn.Module, tmp_path: Path) -> None:
    path, fisher = tmp_path / "statistic", coin.fisher_diagonal(network, BATCHES)
    for values, message in (
        ({**fisher, "tail": torch.ones(2)}, "has a tensor 'tail', which Sequential has not"),
        ({**fisher, "2.bias": torch.ones(2)}, r"has '2\.bias' of \[2\], expected \[3\] of a fisher"),
        ({**fisher, "2.bias": -torch.ones(3)}, r"the statistic is negative in '2\.bias'"),
        ({**fisher, "2.bias": torch.full((3,), torch.nan)}, r"not finite: tensor '2\.bias'"),
    ):
        with pytest.raises(StateError, match=message):
            coin.save_statistic(path, values, network)
    with pytest.raises(StateError, match=r"has '0\.bias' of \[4\], expected \[4, 4, 4\] of a gram"):
        coin.save_statistic(path, {"0.bias": fisher["0.bias"]}, network, statistic="gram")
    save_state(path, network.state_dict(), {"made_by": "a test"})
    with pytest.raises(FileError, match="holds no statistic, expected fisher or gram"):
        coin.load_statistic(path, network)
    with pytest.raises(FileError, match="found no file"):
        coin.load_statistic(tmp_path / "none", network)
