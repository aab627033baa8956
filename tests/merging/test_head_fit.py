import pytest
import torch
from torch import nn

from coin.errors import ConfigurationError, StateError
from coin.merging import Average, FeatureMap, HeadFit, MergeInputs
from coin.networks.batchnorm import BatchNormPolicy

WEIGHTS = (0.2, 0.3, 0.5)


def setup(make, count=3):
    networks = []
    for seed in range(count):
        torch.manual_seed(seed)
        networks.append(make().double())
    inputs = torch.randn(60, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    with torch.no_grad():
        logits = torch.stack([network.eval()(inputs) for network in networks])
    experts = [{k: v.detach().clone() for k, v in network.named_parameters()} for network in networks]
    return (
        MergeInputs(experts, expert_outputs=logits, features=FeatureMap(networks[0], inputs.split(25))),
        networks,
        inputs,
    )


def mlp(bias=True):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=bias))


def test_features_are_the_heads_input():
    inputs, networks, x = setup(mlp)
    for network, expert in zip(networks, inputs.experts, strict=True):
        torch.testing.assert_close(inputs.features.features(expert), network[:2](x).detach())
    assert inputs.features.head == "2"


def test_only_the_head_moves_and_the_residual_falls():
    inputs, networks, x = setup(mlp)
    merged = HeadFit().merge(inputs, WEIGHTS)
    average = Average().merge(inputs, WEIGHTS)
    target = torch.tensordot(torch.tensor(WEIGHTS).double(), inputs.expert_outputs, dims=1)
    for key in ("0.weight", "0.bias"):
        torch.testing.assert_close(merged[key], average[key], rtol=0, atol=0)
    residuals = [
        (torch.func.functional_call(networks[0], parameters, (x,)) - target).norm() for parameters in (merged, average)
    ]
    assert residuals[0] < residuals[1]


def test_with_equal_bodies_the_mixture_is_reached():
    inputs, networks, x = setup(mlp)
    experts = [
        {**expert, "0.weight": inputs.experts[0]["0.weight"], "0.bias": inputs.experts[0]["0.bias"]}
        for expert in inputs.experts
    ]
    outputs = torch.stack([torch.func.functional_call(networks[0], expert, (x,)) for expert in experts]).detach()
    merged = HeadFit().merge(MergeInputs(experts, expert_outputs=outputs, features=inputs.features), WEIGHTS)
    average = Average().merge(MergeInputs(experts), WEIGHTS)
    for key, tensor in average.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-10, atol=1e-10)


def test_identical_experts_merge_to_themselves():
    inputs, *_ = setup(mlp)
    outputs = inputs.expert_outputs[:1].expand(3, -1, -1)
    same = MergeInputs([inputs.experts[0]] * 3, expert_outputs=outputs, features=inputs.features)
    for key, tensor in HeadFit().merge(same, WEIGHTS).items():
        torch.testing.assert_close(tensor, inputs.experts[0][key], rtol=1e-10, atol=1e-10)


def test_permuting_experts_with_their_weights_changes_nothing():
    inputs, *_ = setup(mlp)
    order = [2, 0, 1]
    permuted = MergeInputs(
        [inputs.experts[i] for i in order], expert_outputs=inputs.expert_outputs[order], features=inputs.features
    )
    one, two = HeadFit().merge(inputs, WEIGHTS), HeadFit().merge(permuted, [WEIGHTS[i] for i in order])
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-8, atol=1e-9)


def test_what_it_cannot_do_is_named():
    assert HeadFit().batchnorm is BatchNormPolicy.keep
    inputs, *_ = setup(mlp)
    with pytest.raises(ConfigurationError, match="'head_fit' needs 'features'"):
        HeadFit().merge(MergeInputs(inputs.experts, expert_outputs=inputs.expert_outputs), WEIGHTS)
    without, *_ = setup(lambda: mlp(bias=False))
    with pytest.raises(StateError, match="head with a bias"):
        HeadFit().merge(without, WEIGHTS)
