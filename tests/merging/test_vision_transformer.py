"""Every merge method on attention, LayerNorm, class tokens and positions, in float64."""

from copy import deepcopy

import pytest
import torch

from coin.coding import Code
from coin.merging import (
    Average,
    Coin,
    FullFisher,
    GaussNewton,
    HeadFit,
    MergeInputs,
    RegMean,
    TaskArithmetic,
    Ties,
)
from coin.merging.networks import expert_outputs, merge_row, parameters_of
from coin.networks.heads import replace_head
from coin.networks.small import SmallViT
from coin.statistics import OutputMap, fisher_diagonal, gram_sums

ROW = [0.25, 0.75]
CODE = Code([ROW])
METHODS = [
    Average(),
    Coin(),
    RegMean(),
    RegMean(layers="linear", damping=1e-6, alpha=1.0),
    HeadFit(),
    GaussNewton(max_steps=1, max_iterations=2),
    FullFisher(max_iterations=3, tolerance=0.9),
    TaskArithmetic(scale=0.5),
    Ties(keep=1.0),
]
PACKED = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
OUT = "encoder.layers.encoder_layer_0.self_attention.out_proj.weight"


@pytest.fixture
def initial():
    torch.manual_seed(0)
    network = SmallViT(3, 8, 4, depth=1, heads=2, width=8, mlp_width=12)
    replace_head(network, 3)  # the fresh head is zero
    return network.double().eval()


@pytest.fixture
def experts(initial):
    """Two experts a little way from the initialisation, in every parameter."""
    networks = []
    for seed in (1, 2):
        draw = torch.Generator().manual_seed(seed)
        network = deepcopy(initial)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
        networks.append(network)
    return networks


@pytest.fixture
def batches():
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(8, 3, 8, 8, generator=draw, dtype=torch.float64) for _ in range(3)]


def merged(method, experts, initial, batches):
    """The coded network of one row, as the merge step of an experiment makes it."""
    inputs = MergeInputs(
        experts=[parameters_of(expert) for expert in experts],
        initial=parameters_of(initial),
        fishers=[fisher_diagonal(expert, batches) for expert in experts],
        grams=[gram_sums(expert, batches).mean() for expert in experts],
        expert_outputs=expert_outputs(experts, batches),
        expert_maps=[OutputMap(expert, batches) for expert in experts],
    )
    return merge_row(method, experts, ROW, inputs, batches=batches)[0]


def residual(network, experts, batches):
    with torch.no_grad():
        pairs = [(network(x), CODE.encode(torch.stack([expert(x) for expert in experts]))[0]) for x in batches]
        return float(sum((found - wanted).square().sum() for found, wanted in pairs))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_identical_experts_merge_to_their_outputs(method, experts, initial, batches):
    same = [experts[0], deepcopy(experts[0])]
    network = merged(method, same, initial, batches)
    with torch.no_grad():
        torch.testing.assert_close(network(batches[0]), experts[0](batches[0]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_every_parameter_moves_between_the_experts(method, experts, initial, batches):
    network = merged(method, experts, initial, batches)
    assert all(bool(torch.isfinite(p).all()) for p in network.parameters())
    for name, parameter in network.named_parameters():
        assert not torch.equal(parameter, initial.get_parameter(name)), name
        assert not any(torch.equal(parameter, expert.get_parameter(name)) for expert in experts), name


@pytest.mark.parametrize(
    ("method", "start"),
    [(HeadFit(), Average()), (GaussNewton(max_iterations=4), Coin())],
    ids=["head_fit", "gauss_newton"],
)
def test_methods_that_fit_answers_come_nearer_than_their_start(method, start, experts, initial, batches):
    before = residual(merged(start, experts, initial, batches), experts, batches)
    assert residual(merged(method, experts, initial, batches), experts, batches) < before


def test_regmean_fits_every_linear_map(experts, initial, batches):
    """Σ_i β_i E‖Wa − W_ia‖² on each expert's own inputs falls below the average's, where these inputs differ."""
    grams = [gram_sums(expert, batches).mean() for expert in experts]
    fitted = parameters_of(merged(RegMean(damping=1e-6, alpha=1.0), experts, initial, batches))
    average = parameters_of(merged(Average(), experts, initial, batches))

    def objective(state, key):
        total = 0.0
        for expert, gram, weight in zip(experts, grams, ROW, strict=True):
            own = parameters_of(expert)
            bias = key.removesuffix("weight") + "bias"
            step = torch.cat([(state[n] - own[n]).reshape(len(own[n]), -1) for n in (key, bias)], 1)
            total += weight * float(torch.trace(step @ gram[key][0] @ step.T))
        return total

    assert {"conv_proj.weight", PACKED, OUT, "heads.head.weight"} <= grams[0].keys()
    torch.testing.assert_close(fitted["conv_proj.weight"], average["conv_proj.weight"])  # the same patches
    for key in grams[0].keys() - {"conv_proj.weight"}:
        assert objective(fitted, key) < 0.999 * objective(average, key), key
