import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from coin.errors import CoinWarning, ConfigurationError
from coin.merging import Experts, FullFisher
from coin.statistics import fisher_diagonal, fisher_sums

WEIGHTS = (0.2, 0.3, 0.5)


@pytest.fixture
def networks():
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        made.append(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double())
    return made


@pytest.fixture
def calibration():
    """Unequal tasks in unequal batches."""
    draw = torch.Generator().manual_seed(7)
    tasks = [torch.randn(samples, 4, generator=draw, dtype=torch.float64) for samples in (12, 9, 15)]
    return [task.split(5) for task in tasks]


def dense_jacobian(network, x):
    """J as one tensor ``[P, C, |θ|]``."""
    parameters = {key: value.detach() for key, value in network.named_parameters()}
    parts = jacrev(lambda p: functional_call(network, p, (x,)))(parameters)
    return torch.cat([parts[key].flatten(2) for key in parameters], dim=2)


def flat(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


@pytest.mark.parametrize("data", ["own", "pooled"])
@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_it_is_the_dense_solution(networks, calibration, damping, data):
    method = FullFisher(damping, max_iterations=500, tolerance=1e-12, fisher_data=data)
    found = flat(method.make(Experts(networks, calibration=calibration), WEIGHTS).network)
    average = sum(w * flat(network) for w, network in zip(WEIGHTS, networks, strict=True))
    samples = [torch.cat(task) for task in calibration]
    if data == "pooled":
        samples = [torch.cat(samples)] * 3
    jacobians = [dense_jacobian(*pair) for pair in zip(networks, samples, strict=True)]
    matrices = [torch.einsum("pca,pcb->ab", j, j) / len(j) for j in jacobians]
    diagonal = sum(w * m.diagonal() for w, m in zip(WEIGHTS, matrices, strict=True))
    diagonal = diagonal + 1e-3 * diagonal.mean()
    total = sum(w * m for w, m in zip(WEIGHTS, matrices, strict=True)) + damping * torch.diag(diagonal)
    pull = sum(w * m @ (flat(n) - average) for w, m, n in zip(WEIGHTS, matrices, networks, strict=True))
    torch.testing.assert_close(found, average + torch.linalg.solve(total, pull), rtol=1e-7, atol=1e-8)


def test_what_was_chosen_says_whether_the_solve_converged(networks, calibration):
    experts = Experts(networks, calibration=calibration)
    with pytest.warns(
        CoinWarning, match=r"full_fisher stopped after 2 conjugate-gradient steps .* raise max_iterations"
    ) as told:
        chosen = FullFisher(max_iterations=2, fisher_data="own").make(experts, WEIGHTS).chosen
    assert (chosen["fisher_data"], chosen["converged"], chosen["cg_steps"]) == ("own", False, 2)
    assert chosen["cg_residual"] > 1e-3
    assert f"at a relative residual of {chosen['cg_residual']:.2g}, expected 0.001" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = FullFisher(max_iterations=500, fisher_data="own").make(experts, WEIGHTS).chosen
    assert chosen["converged"] is True
    assert 2 < chosen["cg_steps"] < 500
    assert chosen["cg_residual"] <= 1e-3


def test_passes_are_those_of_the_products_and_the_diagonals(networks, calibration):
    """Each product takes one jvp and one vjp, 5 passes a sample; there is one for the right side and one a step."""
    experts = Experts(networks, calibration=calibration)
    chosen = FullFisher(max_iterations=500, fisher_data="own").make(experts, WEIGHTS).chosen
    diagonals = sum(fisher_sums(*pair).passes for pair in zip(networks, calibration, strict=True))
    assert experts.passes == diagonals + 5 * (12 + 9 + 15) * (chosen["cg_steps"] + 1)


def test_options_and_requirements(networks, calibration):
    for options in ({"damping": -1.0}, {"max_iterations": 0}, {"tolerance": 1.0}):
        with pytest.raises(ConfigurationError):
            FullFisher(**options)
    fishers = [fisher_diagonal(*pair) for pair in zip(networks, calibration, strict=True)]
    with pytest.raises(ConfigurationError, match="found no calibration inputs, which the merge needs"):
        FullFisher().make(Experts(networks, fishers=fishers), WEIGHTS)
