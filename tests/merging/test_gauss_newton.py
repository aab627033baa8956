import pytest
import torch
from torch import nn

from coin.data import Calibration, Samples, pooled
from coin.errors import CoinWarning, ConfigurationError, NumericalError
from coin.merging import Average, Coin, GaussNewton, MergeInputs
from coin.merging.gauss_newton import training_mask
from coin.networks.batchnorm import BatchNormPolicy
from coin.statistics.products import OutputMap

WEIGHTS = (0.2, 0.3, 0.5)


def parameters_of(network):
    return {key: value.detach().clone() for key, value in network.named_parameters()}


def setup(make, samples=30, shape=(6,), fisher=True):
    """Three random experts of one architecture, pooled inputs, and arbitrary positive Fishers, all in float64."""
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(make().double().eval())
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        logits = torch.stack([network(inputs) for network in networks])
    experts = [parameters_of(network) for network in networks]
    fishers = [
        {k: torch.rand(v.shape, generator=generator, dtype=torch.float64) * fisher for k, v in expert.items()}
        for expert in experts
    ]
    return MergeInputs(experts, fishers=fishers, outputs=OutputMap(networks[0], [inputs]), expert_outputs=logits)


def mixture(inputs):
    return torch.tensordot(torch.tensor(WEIGHTS, dtype=torch.float64), inputs.expert_outputs, dims=1)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(6, 4), (6,)),
        (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, groups=1), nn.Flatten()), (2, 4, 4)),
    ],
)
def test_a_network_linear_in_its_parameters_reaches_the_mixture(make, shape):
    inputs = setup(make, samples=60, shape=shape)
    start = Coin(1e-6).merge(inputs, WEIGHTS)
    assert (inputs.outputs.outputs(start) - mixture(inputs)).norm() > 0.1
    merged = GaussNewton(max_iterations=40, max_steps=6).merge(inputs, WEIGHTS)
    torch.testing.assert_close(inputs.outputs.outputs(merged), mixture(inputs), rtol=1e-7, atol=1e-7)
    average = {key: sum(w * e[key] for w, e in zip(WEIGHTS, inputs.experts, strict=True)) for key in merged}
    for key, tensor in average.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-6, atol=1e-6)


def test_a_deep_network_gets_closer_also_where_it_was_not_fitted():
    inputs = setup(mlp, samples=150)
    held_out = ~training_mask(150)
    points = [Coin(1e-6).merge(inputs, WEIGHTS)]
    points += [GaussNewton(max_steps=steps, tolerance=0).merge(inputs, WEIGHTS) for steps in (1, 3)]
    errors = [float((inputs.outputs.outputs(point) - mixture(inputs))[held_out].norm()) for point in points]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.5 * errors[0]


def test_identical_experts_merge_to_themselves():
    inputs = setup(mlp)
    same = MergeInputs(
        [inputs.experts[0]] * 3,
        fishers=inputs.fishers,
        outputs=inputs.outputs,
        expert_outputs=inputs.expert_outputs[:1].expand(3, -1, -1),
    )
    merged = GaussNewton().merge(same, WEIGHTS)
    for key, tensor in inputs.experts[0].items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-10, atol=1e-10)


def test_permuting_experts_with_their_weights_changes_nothing():
    inputs = setup(mlp)
    order = [2, 0, 1]
    permuted = MergeInputs(
        [inputs.experts[i] for i in order],
        fishers=[inputs.fishers[i] for i in order],
        outputs=inputs.outputs,
        expert_outputs=inputs.expert_outputs[order],
    )
    method = GaussNewton(max_steps=2, max_iterations=8)
    one, two = method.merge(inputs, WEIGHTS), method.merge(permuted, [WEIGHTS[i] for i in order])
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-7, atol=1e-8)


def test_without_any_fisher_the_metric_is_the_identity():
    inputs = setup(mlp, fisher=False)
    with pytest.warns(CoinWarning, match=r"^method 'gauss_newton': the Fisher of expert 0, 1, 2 is zero everywhere"):
        merged = GaussNewton().merge(inputs, WEIGHTS)
    before = (inputs.outputs.outputs(Average().merge(inputs, WEIGHTS)) - mixture(inputs)).norm()
    assert (inputs.outputs.outputs(merged) - mixture(inputs)).norm() < before


def test_the_last_fifth_is_held_out():
    assert training_mask(10).tolist() == [True] * 8 + [False] * 2
    assert training_mask(3).tolist() == [True, True, False]
    assert training_mask(2).tolist() == [True, False]
    with pytest.raises(NumericalError, match="found 1 pooled"):
        training_mask(1)


@pytest.mark.parametrize("sizes", [(20,) * 5, (5,) * 5, (10,) * 10, (40, 20, 20, 10, 10)])
def test_every_task_is_fitted_and_held_out_in_its_share(sizes):
    images = torch.zeros(max(sizes), 1, 4, 4, dtype=torch.uint8)
    labels = torch.zeros(max(sizes), dtype=torch.int64)
    task = pooled([Calibration.of(Samples.of(images[:size], labels[:size]), 4) for size in sizes]).part
    training = training_mask(len(task))
    for index, size in enumerate(sizes):
        assert int((task[~training] == index).sum()) == size // 5
        assert int((task[training] == index).sum()) == size - size // 5


def test_two_samples_still_make_a_network():
    inputs = setup(mlp, samples=2)
    merged = GaussNewton().merge(inputs, WEIGHTS)
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())


def test_options_and_requirements():
    assert GaussNewton().batchnorm is BatchNormPolicy.keep
    for options in ({"max_steps": 0}, {"max_iterations": 0}, {"tolerance": 1.0}, {"ridge": 0.0}, {"damping": -1.0}):
        with pytest.raises(ConfigurationError):
            GaussNewton(**options)
    inputs = setup(mlp)
    with pytest.raises(ConfigurationError, match="needs 'outputs'"):
        GaussNewton().merge(MergeInputs(inputs.experts, fishers=inputs.fishers), WEIGHTS)
