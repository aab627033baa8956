from copy import deepcopy

import pytest
import torch
from torch import nn

from coin.errors import ConfigurationError, StateError
from coin.merging import Average, Experts, HeadFit

WEIGHTS = (0.2, 0.3, 0.5)


def mlp(bias=True):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=bias))


class Temperature(nn.Sequential):
    """Logits that are half of what its last layer gives."""

    def forward(self, x):
        return super().forward(x) / 2


def setup(make=mlp, same_bodies=False):
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(make().double())
        if same_bodies:
            networks[-1][0] = deepcopy(networks[0][0])
    inputs = torch.randn(60, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return Experts(networks, calibration=[part.split(12) for part in inputs.split(20)]), inputs


@pytest.mark.parametrize("bias", [True, False])
def test_only_the_head_moves_and_the_residual_falls(bias):
    experts, inputs = setup(lambda: mlp(bias))
    merged, average = (method.make(experts, WEIGHTS).network for method in (HeadFit(), Average()))
    for key in ("0.weight", "0.bias"):
        torch.testing.assert_close(merged.get_parameter(key), average.get_parameter(key), rtol=0, atol=0)
    with torch.no_grad():
        target = sum(weight * network(inputs) for weight, network in zip(WEIGHTS, experts.networks, strict=True))
        residuals = [float((network(inputs) - target).norm()) for network in (merged, average)]
    assert residuals[0] < 0.9 * residuals[1]


@pytest.mark.parametrize("bias", [True, False])
def test_with_equal_bodies_the_mixture_is_reached(bias):
    experts, _ = setup(lambda: mlp(bias), same_bodies=True)
    merged, average = (method.make(experts, WEIGHTS).network for method in (HeadFit(), Average()))
    for key, tensor in average.named_parameters():
        torch.testing.assert_close(merged.get_parameter(key), tensor, rtol=1e-10, atol=1e-10)


def test_it_costs_one_pass_of_each_network():
    experts, inputs = setup()
    HeadFit().make(experts, WEIGHTS)
    assert experts.passes == 4 * len(inputs)


def test_what_it_cannot_do_is_named():
    experts, _ = setup()
    with pytest.raises(ConfigurationError, match="found no calibration inputs, which the merge needs"):
        HeadFit().make(Experts(experts.networks), WEIGHTS)
    with pytest.raises(StateError, match=r"^the logits of Temperature are not its head '2' \(Linear\) of [^\n]*$"):
        HeadFit().make(setup(lambda: Temperature(*mlp()))[0], WEIGHTS)
