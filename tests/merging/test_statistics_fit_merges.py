"""The statistics room's Gram matrices and Fishers, straight into the merges: their names and layouts must agree."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from coin.merging.coin import coin_parameters
from coin.merging.regmean import regmean_parameters
from coin.statistics import fisher_diagonal, gram_sums

WEIGHTS = (0.2, 0.3, 0.5)
NETWORKS = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Flatten()), (3, 6)),
    "strided convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Flatten()), (2, 5, 5)),
    "grouped convolution": (lambda: nn.Sequential(nn.Conv2d(4, 6, (3, 2), groups=2), nn.Flatten()), (4, 4, 4)),
    "convolution in time": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, bias=False), nn.Flatten()), (2, 6)),
}


def setup(name):
    make, shape = NETWORKS[name]
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(make().double())
    data = [torch.randn(20, *shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    return networks, [{k: v.detach() for k, v in network.named_parameters()} for network in networks], data


@pytest.mark.parametrize("name", NETWORKS)
def test_a_linear_network_on_pooled_data_reaches_the_mixture(name):
    networks, experts, data = setup(name)
    pooled = torch.cat(data)
    grams = [gram_sums(network, pooled.split(25)).mean() for network in networks]
    fishers = [fisher_diagonal(network, pooled.split(25)) for network in networks]
    with torch.no_grad():
        mixture = sum(w * network(pooled) for w, network in zip(WEIGHTS, networks, strict=True))
    for merged in (
        regmean_parameters(experts, grams, WEIGHTS),
        regmean_parameters(experts, grams, WEIGHTS, alpha=1, damping=0),
        coin_parameters(experts, fishers, WEIGHTS),
    ):
        outputs = functional_call(networks[0], merged, (pooled,))
        torch.testing.assert_close(outputs, mixture, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_regmean_on_own_data_minimises_the_weighted_output_error(name):
    """Its gradient there, by autograd through the networks themselves, is zero; the average's is not."""
    networks, experts, data = setup(name)
    grams = [gram_sums(network, [x]).mean() for network, x in zip(networks, data, strict=True)]

    def slope(parameters):
        leaves = {key: value.clone().requires_grad_() for key, value in parameters.items()}
        error = sum(
            w * (functional_call(network, leaves, (x,)) - network(x).detach()).square().sum()
            for w, network, x in zip(WEIGHTS, networks, data, strict=True)
        )
        return torch.cat([g.flatten() for g in torch.autograd.grad(error, list(leaves.values()))]).norm()

    merged = regmean_parameters(experts, grams, WEIGHTS, alpha=1, damping=0)
    average = {key: sum(w * e[key] for w, e in zip(WEIGHTS, experts, strict=True)) for key in experts[0]}
    assert slope(merged) < 1e-9 * slope(average)
