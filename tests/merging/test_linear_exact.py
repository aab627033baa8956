"""One linear layer on common inputs, in float64: there is a network that answers Σβ_if_i, and methods find it."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from coin.merging import Average, Coin, FeatureMap, FullFisher, GaussNewton, HeadFit, MergeInputs, RegMean
from coin.statistics import OutputMap, fisher_diagonal
from coin.statistics.gram import gram_sums

WEIGHTS = (0.2, 0.3, 0.5)


@pytest.mark.parametrize(
    "method",
    [
        Average(),
        Coin(),
        Coin(damping=0),
        FullFisher(),
        FullFisher(damping=0, max_iterations=200, tolerance=1e-13),
        RegMean(),
        RegMean(alpha=1, damping=0),
        GaussNewton(),
        HeadFit(),
    ],
    ids=lambda method: f"{method.name}",
)
def test_the_mixture_is_reached_to_rounding(method):
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double())
    x = torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    with torch.no_grad():
        outputs = torch.stack([network(x) for network in networks])
    inputs = MergeInputs(
        [{key: value.detach() for key, value in network.named_parameters()} for network in networks],
        fishers=[fisher_diagonal(network, [x]) for network in networks],
        grams=[gram_sums(network, [x]).mean() for network in networks],
        outputs=OutputMap(networks[0], [x]),
        expert_outputs=outputs,
        expert_maps=[OutputMap(network, [x]) for network in networks],
        features=FeatureMap(networks[0], [x]),
    )
    found = functional_call(networks[0], method.merge(inputs, WEIGHTS), (x,))
    wanted = torch.tensordot(torch.tensor(WEIGHTS, dtype=torch.float64), outputs, dims=1)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
