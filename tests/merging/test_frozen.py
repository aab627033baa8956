"""Networks of which some parameters were frozen, or all."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from coin.coding import Code
from coin.merging import Average, Coin, HeadFit, Refit, RegMean, merge_networks

CODE = Code([[0.3, 0.7]])
METHODS = [Average(), Coin(), RegMean(), RegMean(alpha=None, damping=None), HeadFit()]
HEAD = ("2.weight", "2.bias")


def make(seed, base=0, dtype=torch.float64):
    torch.manual_seed(base)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    torch.manual_seed(seed)
    network[2].reset_parameters()
    return network


def calibration(dtype=torch.float64):
    draw = torch.Generator().manual_seed(5)
    return [[torch.randn(12, 6, generator=draw, dtype=dtype)] for _ in range(2)]


def flags(networks):
    return [[p.requires_grad for p in network.parameters()] for network in networks]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_what_was_frozen_stays_to_the_last_bit_and_the_rest_merges(method):
    dtype = torch.float32
    experts = [make(1, dtype=dtype), make(2, dtype=dtype)]
    for expert in experts:
        expert[0].requires_grad_(False)
    found = flags(experts)
    (coded,) = merge_networks(method, experts, CODE, calibration=calibration(dtype))
    assert flags(experts) == found
    for name, tensor in coded.state_dict().items():
        assert torch.equal(tensor, experts[0].state_dict()[name]) == (name not in HEAD)


@pytest.mark.parametrize("method", [Coin(), RegMean(), Refit("both")], ids=lambda method: method.label)
def test_networks_that_are_frozen_altogether_merge_as_if_they_were_not(method):
    experts = [make(1), make(2, base=3)]
    frozen = [deepcopy(expert).requires_grad_(False) for expert in experts]
    expected, found = (
        merge_networks(method, each, CODE, calibration=calibration())[0].state_dict() for each in (experts, frozen)
    )
    assert not any(map(any, flags(frozen)))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("method", METHODS[1:7], ids=lambda method: method.label)
def test_what_is_frozen_in_one_expert_alone_is_averaged(method):
    experts = [make(1), make(2, base=3)]
    experts[1][0].requires_grad_(False)
    (coded,) = merge_networks(method, experts, CODE, calibration=calibration())
    average = merge_networks(Average(), experts, CODE)[0].state_dict()
    for name, tensor in coded.state_dict().items():
        if name not in HEAD:
            assert torch.equal(tensor, average[name])
        elif name == HEAD[0]:  # the Fisher of a bias is the same for all experts
            assert (tensor - average[name]).abs().max() > 1e-6
