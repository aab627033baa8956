"""Adapters against regressions written out, and bodies with adapters from the fit to a file and a coded system."""

from copy import deepcopy

import pytest
import torch
from near_experts import answers, assert_same_tensors, case_of, distance, near_experts, perceptron
from torch import nn
from torch.testing import assert_close

import coin
from coin.coding import uniform
from coin.errors import ConfigurationError, DataError, NumericalError, StateError
from coin.files.tensors import nbytes
from coin.merging import Average, Experts, Refit, extract_lora, fit_adapters, merge_networks
from coin.networks import NetworkConfig, build_network, load_network, save_network
from coin.networks.adapted import stored_nbytes, with_adapters
from coin.networks.running import features_and_logits


def parts_of(kind, samples=60):
    """Return three experts in float32, and a batch of inputs for each."""
    networks, tasks = case_of(kind, 3 * (samples,))
    return [network.float() for network in networks], [[task.float()] for task in tasks]


@torch.no_grad()
def feature_error(body, expert, x, place=None):
    """How far the features of a body, with the adapter of one place, are from an expert's."""
    found, _ = features_and_logits(body, x, place)
    wanted, _ = features_and_logits(expert, x)
    return float((found - wanted).norm() / wanted.norm())


# One unit, by the book


def centred(x):
    return x - x.mean(0)


@pytest.mark.parametrize("kernel", [1, 3])  # of which on one pixel the middle tap alone counts
@pytest.mark.parametrize("samples", [9, 50])  # fewer rows than unknowns, and more
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_correction_is_the_reduced_rank_regression_drawn_to_the_experts_own_map(
    kernel, samples, rank, tmp_path
):
    torch.manual_seed(2)
    networks = []
    for _ in range(2):
        layer = nn.Conv2d(12, 8, kernel, padding=kernel // 2)
        network = nn.Sequential(
            layer,
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8, 3),
        )
        networks.append(network.double())
    base, network = networks
    x = torch.randn(samples, 12, 1, 1, dtype=torch.float64) + 1
    made = extract_lora(network, base, [x], rank, tmp_path)
    middle = (..., kernel // 2, kernel // 2)
    body = base[0].weight.detach()[middle]
    own = network[0].weight.detach()[middle]
    a = centred(x.flatten(1))
    z = centred(network[0](x).detach().flatten(1))
    covariance = a.T @ a / samples
    ridge = 0.1 * covariance.trace() / (12 * kernel**2)
    metric = covariance + ridge * torch.eye(12)
    best = torch.linalg.solve(metric, a.T @ z / samples + ridge * own.T).T - body
    root = torch.linalg.cholesky(metric)
    u, s, v = torch.linalg.svd(best @ root, full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ v[:rank]
    expected = torch.linalg.solve(root.T, cut.T).T
    assert_close(made[0].weight[middle] - body, expected, rtol=1e-3, atol=1e-4)


def test_scales_and_shifts_are_regressions_drawn_to_one_that_bytes_hold():
    torch.manual_seed(3)
    experts = [perceptron(5, 6, 3) for _ in range(2)]
    x = torch.randn(30, 5) + 1
    adapted = fit_adapters(experts[0], experts, [[x], [x]], rank=0)
    bias = experts[0][0].bias.detach()
    y = answers(experts[0][0], x) - bias
    z = answers(experts[1][0], x)
    variance = centred(y).square().mean(0)
    covariance = (centred(y) * centred(z)).mean(0)
    penalty = 0.01 * variance.mean()
    scale = (covariance + penalty) / (variance + penalty)
    changes = adapted.adapters[1].changes
    kept_scale = changes["0.weight"].scales()
    shift = z.mean(0) - kept_scale * y.mean(0) - bias
    kept_shift = changes["0.bias"](torch.zeros(6))
    for kept, wanted in ((kept_scale, scale), (kept_shift, shift)):
        half_step = (wanted.max() - wanted.min()) / 510
        assert (kept - wanted).abs().max() <= 1.01 * half_step


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_inputs_that_are_constant_within_a_task_fit_nothing_but_shifts(size):
    """The round-off of centring is no signal: a correction is then the difference to the expert's own map."""
    torch.manual_seed(0)
    experts = [perceptron(12, 16, 5) for _ in range(2)]
    inputs = [[size * torch.randn(12).expand(200, 12)] for _ in experts]
    adapted = fit_adapters(experts[0], experts, inputs, rank=12)
    made = adapted.network(1)[0]
    assert distance(made, experts[1][0], torch.randn(500, 12)) < 0.2 * size
    assert bool((adapted.adapters[1].changes["0.weight"].scales() == 1).all())


def test_a_parameter_without_dimensions_is_changed_as_others_are():
    experts, inputs = parts_of("one scale")
    adapted = fit_adapters(experts[0], experts, inputs, rank=2)
    network = adapted.network(1, head=experts[1][3])
    assert network[2].weight.shape == ()
    x = inputs[1][0]
    assert distance(network, experts[1], x) < distance(experts[0], experts[1], x) / 3


# Bodies


@pytest.mark.parametrize("kind", ["convolutions", "layer norm", "encoder layer"])
def test_with_full_rank_a_body_becomes_each_expert_and_stays_itself(kind):
    experts, inputs = parts_of(kind, samples=150)
    body = merge_networks(Average(batchnorm="average"), experts, uniform(3))[0]
    before = deepcopy(body)
    whole = fit_adapters(body, experts, inputs, rank=99, ridge=1e-4)
    poor = fit_adapters(body, experts, inputs, rank=0)
    for place, expert in enumerate(experts):
        (x,) = inputs[place]
        near = feature_error(whole, expert, x, place)
        assert near < 0.6 * feature_error(poor, expert, x, place)
    assert_same_tensors(body, before)


def test_more_rank_is_nearer_and_no_rank_nearer_than_one_network_for_all():
    experts, inputs = parts_of("convolutions", samples=200)
    (x,) = inputs[2]
    (whole,) = merge_networks(Refit(), experts, uniform(3), calibration=inputs)
    errors = [feature_error(whole, experts[2], x)]
    for rank in (0, 1, 3):
        method = Refit(adapters={"rank": rank})
        (body,) = merge_networks(method, experts, uniform(3), calibration=inputs)
        errors.append(feature_error(body, experts[2], x, place=2))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", [Refit, Average])
def test_adapters_are_fitted_to_the_rounded_body_and_a_file_holds_both(method, tmp_path):
    config = NetworkConfig("small_resnet", 16, None, {"width": 4})
    networks, tasks = near_experts(lambda: build_network(config, 3, seed=0), (3, 16, 16), (40, 40))
    networks = [network.float() for network in networks]
    inputs = [[task.float()] for task in tasks]
    experts = Experts(networks, calibration=inputs)
    merge = method(adapters={"rank": 2})
    made = merge.coded_model(experts, [0.5, 0.5])
    packed = merge.pack(experts, [0.5, 0.5], made, 2)
    rounded = with_adapters(packed.network(), packed.adapters)
    of_whole_body = with_adapters(packed.network(), made.adapters)
    (x,) = inputs[0]
    error = feature_error(rounded, networks[0], x, place=0)
    assert error < 0.8 * feature_error(of_whole_body, networks[0], x, place=0)
    save_network(tmp_path / "body.safetensors", made.network, config, 3, {}, made.adapters)
    file = load_network(tmp_path / "body.safetensors")
    packed.save(tmp_path / "packed.safetensors")
    again = coin.Compressed.load(tmp_path / "packed.safetensors", networks[0])
    assert again.nbytes == packed.nbytes
    for found, expected in ((file, made), (again, packed)):
        for one, other in zip(found.adapters, expected.adapters, strict=True):
            assert_close(one.tensors, other.tensors, rtol=0, atol=0)


def test_experts_without_a_share_have_no_adapters():
    experts, inputs = parts_of("groups")
    code = [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    made = merge_networks(Refit(adapters={"rank": 1}), experts, code, calibration=inputs)
    for body, row in zip(made, code, strict=True):
        assert [each.nbytes > 0 for each in body.adapters] == [share > 0 for share in row]


def test_one_sample_of_a_task_is_enough():
    experts, inputs = parts_of("layer norm", samples=1)
    adapted = fit_adapters(experts[0], experts, inputs, rank=4)
    assert bool(adapted(inputs[1][0], experts=1).isfinite().all())


def test_networks_that_are_nothing_but_a_head_have_empty_adapters():
    experts, inputs = parts_of("more unknowns")
    adapted = fit_adapters(experts[0], experts, inputs)
    assert [each.nbytes for each in adapted.adapters] == [0, 0, 0]


# A coded system whose coded model is a body


@pytest.mark.parametrize("kind", ["whole", "compressed"])
def test_a_body_is_measured_as_it_is_kept(kind):
    experts, inputs = parts_of("convolutions", samples=80)
    method = Refit(adapters={"rank": 4}, compress={"bits": 4})
    made = merge_networks(method, experts, uniform(3), calibration=inputs)
    body = made[0] if kind == "whole" else made.compressed["refit+rank4-4bit"][0]
    kept = stored_nbytes(body) if kind == "whole" else body.nbytes
    coded = coin.Coded(uniform(3), experts, [body], names="abc")
    tests = []
    for expert, (x,) in zip(experts, inputs, strict=True):
        tests.append([(x, answers(expert, x).argmax(1))])
    table = coin.evaluate(coded, tests)
    heads = sum(nbytes(expert[7].parameters()) + 8 for expert in experts)  # with class counts
    assert table["decoder"].tolist() == ["expert_head"] * 3
    assert table["nda"].min() > 0.9
    assert table["residual"].isna().all()
    assert table["memory_mib"].tolist() == [(kept + heads) / 2**20] * 3
    held = nbytes(coded.coded[0].state_dict().values())
    largest = max(nbytes([parameter]) for parameter in experts[0].parameters())
    assert table["resident_mib"].tolist() == [(held + largest + heads) / 2**20] * 3


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "found {} for adapters, expected {rank: 16}"),
        ({"rank": -1}, "found rank=-1"),
        ({"rank": 1, "ridge": 0}, "found ridge=0"),
        ({"rank": 0, "scales": False}, "found rank=0, expected a whole number of at least 1"),
        ({"bits": 4}, "found .*bits.* for adapters, expected {rank: 16}"),
        (16, "found 16 for adapters, expected {rank: 16}"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Average(adapters=options)


def enlarged(network):
    """Return a network whose outputs overflow."""
    large = deepcopy(network)
    for parameter in large.parameters():
        parameter.data.fill_(3e38)
    return large


REFUSED = {
    "another body": (
        lambda experts, inputs: (nn.Linear(4, 3), experts, inputs),
        StateError,
        r"'the body' has .*another architecture",
    ),
    "no samples": (
        lambda experts, inputs: (experts[0], experts, [*inputs[:2], [inputs[2][0][:0]]]),
        DataError,
        "no calibration samples of task 2",
    ),
    "outputs that overflow": (
        lambda experts, inputs: (experts[0], [*experts[:2], enlarged(experts[2])], inputs),
        NumericalError,
        "inputs or outputs on calibration data are not finite",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fitted_is_refused(name):
    change, error, message = REFUSED[name]
    experts, inputs = parts_of("two layers")
    with pytest.raises(error, match=message):
        fit_adapters(*change(experts, inputs), rank=0)
