import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from coin.errors import ConfigurationError
from coin.merging import Average, FullFisher, MergeInputs
from coin.statistics.products import OutputMap

WEIGHTS = (0.2, 0.3, 0.5)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def setup(make, pooled=False, samples=12):
    networks, data = [], []
    generator = torch.Generator().manual_seed(7)
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(make().double())
        data.append(torch.randn(samples, 4, generator=generator, dtype=torch.float64))
    if pooled:
        data = [torch.cat(data)] * 3
    experts = [{k: v.detach().clone() for k, v in network.named_parameters()} for network in networks]
    jacobians = [dense_jacobian(*pair) for pair in zip(networks, experts, data, strict=True)]
    shapes = {key: tensor.shape for key, tensor in experts[0].items()}
    fishers = [unflatten((j.square().sum(1)).mean(0), shapes) for j in jacobians]
    maps = [OutputMap(network, [x]) for network, x in zip(networks, data, strict=True)]
    return MergeInputs(experts, fishers=fishers, expert_maps=maps), jacobians, data, networks


def dense_jacobian(network, expert, x):
    """J as one tensor ``[P, C, |θ|]``."""
    parts = jacrev(lambda p: functional_call(network, p, (x,)))(expert)
    return torch.cat([parts[key].flatten(2) for key in expert], dim=2)


def flatten(state):
    return torch.cat([tensor.flatten() for tensor in state.values()])


def unflatten(vector, shapes):
    pieces = vector.split([shape.numel() for shape in shapes.values()])
    return {key: piece.reshape(shape) for (key, shape), piece in zip(shapes.items(), pieces, strict=True)}


@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_it_is_the_dense_solution(damping):
    inputs, jacobians, _, _ = setup(mlp)
    merged = FullFisher(damping, max_iterations=500, tolerance=1e-12).merge(inputs, WEIGHTS)
    average = flatten(Average().merge(MergeInputs(inputs.experts), WEIGHTS))
    matrices = [torch.einsum("pca,pcb->ab", j, j) / len(j) for j in jacobians]
    diagonal = sum(w * m.diagonal() for w, m in zip(WEIGHTS, matrices, strict=True))
    diagonal = diagonal + 1e-3 * diagonal.mean()
    total = sum(w * m for w, m in zip(WEIGHTS, matrices, strict=True)) + damping * torch.diag(diagonal)
    pull = sum(
        w * m @ (flatten(expert) - average) for w, m, expert in zip(WEIGHTS, matrices, inputs.experts, strict=True)
    )
    torch.testing.assert_close(flatten(merged), average + torch.linalg.solve(total, pull), rtol=1e-7, atol=1e-8)


def test_a_linear_network_reaches_the_mixture():
    inputs, _, data, networks = setup(lambda: nn.Linear(4, 3), pooled=True)
    merged = FullFisher(damping=0, tolerance=1e-10).merge(inputs, WEIGHTS)
    with torch.no_grad():
        mixture = sum(w * network(data[0]) for w, network in zip(WEIGHTS, networks, strict=True))
    torch.testing.assert_close(functional_call(networks[0], merged, (data[0],)), mixture, rtol=1e-8, atol=1e-8)


def test_identical_experts_merge_to_themselves():
    inputs, *_ = setup(mlp)
    same = MergeInputs([inputs.experts[0]] * 3, fishers=inputs.fishers, expert_maps=inputs.expert_maps)
    merged = FullFisher().merge(same, WEIGHTS)
    torch.testing.assert_close(flatten(merged), flatten(inputs.experts[0]), rtol=1e-12, atol=1e-12)


def test_permuting_experts_with_their_weights_changes_nothing():
    inputs, *_ = setup(mlp)
    order = [2, 0, 1]
    permuted = MergeInputs(
        [inputs.experts[i] for i in order],
        fishers=[inputs.fishers[i] for i in order],
        expert_maps=[inputs.expert_maps[i] for i in order],
    )
    method = FullFisher(max_iterations=200, tolerance=1e-11)
    one, two = method.merge(inputs, WEIGHTS), method.merge(permuted, [WEIGHTS[i] for i in order])
    torch.testing.assert_close(flatten(one), flatten(two), rtol=1e-7, atol=1e-8)


def test_running_out_of_iterations_is_a_warning_with_the_residual():
    inputs, *_ = setup(mlp)
    with pytest.warns(
        UserWarning, match=r"full_fisher stopped after 2 conjugate-gradient steps .* raise max_iterations"
    ):
        FullFisher(max_iterations=2).merge(inputs, WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FullFisher(max_iterations=500).merge(inputs, WEIGHTS)


def test_options_and_requirements():
    for options in ({"damping": -1.0}, {"max_iterations": 0}, {"tolerance": 1.0}):
        with pytest.raises(ConfigurationError):
            FullFisher(**options)
    inputs, *_ = setup(mlp)
    with pytest.raises(ConfigurationError, match="needs 'expert_maps'"):
        FullFisher().merge(MergeInputs(inputs.experts, fishers=inputs.fishers), WEIGHTS)
