"""The closed forms against their formulas, written out or minimised by force."""

import pytest
import torch
from near_experts import ROW, answers, experts_of, mixture, near_experts
from torch import nn
from torch.testing import assert_close

import coin
from coin.errors import NumericalError, StateError
from coin.files.tensors import weighted_sum
from coin.merging.coin import coin_parameters
from coin.merging.regmean import regmean_parameters

# A convolution in two groups of two inputs each, and a head.
SHAPES = {
    "conv.weight": (4, 2, 3, 3),
    "conv.bias": (4,),
    "head.weight": (3, 5),
    "head.bias": (3,),
}


def random_state(seed):
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in SHAPES.items():
        state[name] = torch.randn(shape, generator=draw, dtype=torch.float64)
    return state


def squares(state):
    return {name: tensor.square() for name, tensor in state.items()}


EXPERTS = [random_state(seed) for seed in range(3)]
FISHERS = [squares(random_state(seed)) for seed in range(100, 103)]
AVERAGE = weighted_sum(EXPERTS, ROW)


def assert_states_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found[name], tensor, rtol=1e-10, atol=1e-12)


# COIN


@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.5])
def test_coin_is_the_closed_form(damping):
    total = weighted_sum(FISHERS, ROW)
    entries = torch.cat([tensor.flatten() for tensor in total.values()])
    ridge = damping * entries.mean()
    expected = {}
    for name in SHAPES:
        pulled = torch.zeros(SHAPES[name], dtype=torch.float64)
        for weight, fisher, expert in zip(ROW, FISHERS, EXPERTS, strict=True):
            pulled += weight * (fisher[name] + ridge) * expert[name]
        expected[name] = pulled / (total[name] + ridge)
    assert_states_close(coin_parameters(EXPERTS, FISHERS, ROW, damping), expected)


@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_with_equal_fishers_or_none_the_average_stands(damping):
    equal = coin_parameters(EXPERTS, [FISHERS[0]] * 3, ROW, damping)
    assert_states_close(equal, AVERAGE)
    fishers = [dict(fisher) for fisher in FISHERS]
    for fisher in fishers:
        fisher["head.weight"] = torch.zeros(3, 5, dtype=torch.float64)
        del fisher["head.bias"]
    merged = coin_parameters(EXPERTS, fishers, ROW, damping)
    for name in SHAPES:
        is_average = torch.allclose(merged[name], AVERAGE[name], rtol=1e-12, atol=1e-12)
        assert is_average == name.startswith("head")


# RegMean


def random_grams(seed, groups):
    """Return Gram matrices of the convolution in so many groups, without its bias, and of the head with its own."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(groups, 40, 18, generator=draw, dtype=torch.float64)
    features = torch.randn(40, 5, generator=draw, dtype=torch.float64)
    with_one = torch.cat([features, torch.ones(40, 1, dtype=torch.float64)], 1)
    return {
        "conv.weight": inputs.mT @ inputs / 40,
        "head.weight": (with_one.T @ with_one / 40)[None],
    }


def matrices_of(state, name, groups):
    """Return a layer's matrices [G, O/G, K], the head's with its bias as a further column."""
    matrix = state[name].flatten(1)
    if name == "head.weight":
        matrix = torch.cat([matrix, state["head.bias"][:, None]], 1)
    return matrix.view(groups, -1, matrix.shape[1])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("alpha", "damping"), [(1.0, 0.0), (0.7, 1.0)])
def test_regmean_is_the_damped_regression_of_each_group(groups, alpha, damping):
    grams = [random_grams(seed, groups) for seed in range(3)]
    merged = regmean_parameters(EXPERTS, grams, ROW, alpha, damping)
    for name, count in (("conv.weight", groups), ("head.weight", 1)):
        average = matrices_of(AVERAGE, name, count)
        found = matrices_of(merged, name, count)
        pull = 0
        ridge = 0
        for weight, expert, gram in zip(ROW, EXPERTS, grams, strict=True):
            own = gram[name]
            shrunk = torch.where(torch.eye(own.shape[1]).bool(), own, alpha * own)
            pull = pull + weight * (found - matrices_of(expert, name, count)) @ shrunk
            ridge = ridge + damping * weight * own.diagonal(dim1=1, dim2=2).mean(1)
        assert_close(pull, ridge[:, None, None] * (average - found), rtol=1e-9, atol=1e-10)
    assert_close(merged["conv.bias"], AVERAGE["conv.bias"])


def test_regmean_of_linear_layers_leaves_convolutions_averaged():
    grams = [random_grams(seed, 1) for seed in range(3)]
    linear = regmean_parameters(EXPERTS, grams, ROW, layers="linear")
    everything = regmean_parameters(EXPERTS, grams, ROW, layers="all")
    assert_close(linear["conv.weight"], AVERAGE["conv.weight"])
    assert_close(linear["head.weight"], everything["head.weight"])
    assert not torch.allclose(everything["conv.weight"], linear["conv.weight"])


def test_a_singular_gram_is_refused_or_damped_to_the_average():
    one_input = torch.zeros(1, 6, 6, dtype=torch.float64)
    one_input[0, 0, 0] = 1
    grams = [{"head.weight": one_input}] * 3
    with pytest.raises(NumericalError, match=r"Gram matrix of .head\.weight. is singular"):
        regmean_parameters(EXPERTS, grams, ROW, alpha=1, damping=0)
    assert_states_close(regmean_parameters(EXPERTS, grams, ROW, 1, 1e-3), AVERAGE)
    nothing = [{"head.weight": torch.zeros_like(one_input)}] * 3
    assert_states_close(regmean_parameters(EXPERTS, nothing, ROW, 1, 0), AVERAGE)


@pytest.mark.parametrize("width", [8, 128])
@pytest.mark.parametrize("seed", range(4))
def test_a_gram_matrix_that_rounding_hides_is_singular_all_the_same(width, seed):
    """One sample short of full rank, Cholesky's last pivot is rounding noise, positive as often as not."""
    draw = torch.Generator().manual_seed(seed)
    data = torch.randn(width - 1, width, generator=draw, dtype=torch.float64)
    expert = {"w.weight": torch.randn(3, width, generator=draw, dtype=torch.float64)}
    grams = [{"w.weight": (data.T @ data)[None]}] * 2
    with pytest.raises(NumericalError, match="singular"):
        regmean_parameters([expert, expert], grams, (0.5, 0.5), alpha=1, damping=0)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        ({"head.weight": torch.eye(4)[None]}, "1 groups of 4 rows .* expected 5, or 6 with a bias"),
        ({"conv.weight": torch.ones(3, 18, 18)}, "3 groups of 18 rows for 4 outputs, expected 18"),
    ],
)
def test_a_gram_matrix_of_another_layer_is_refused(gram, message):
    with pytest.raises(StateError, match=message):
        regmean_parameters(EXPERTS, [gram] * 3, ROW)


# With the statistics of networks

NETWORKS = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "no bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Flatten()), (3, 6)),
    "strided": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.Flatten()), (2, 5, 5)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Flatten()), (4, 4, 4)),
    "in time": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, bias=False), nn.Flatten()), (2, 6)),
}
POOLED = [
    coin.Coin(0, fisher_data="pooled"),
    coin.RegMean(gram_data="pooled"),
    coin.RegMean(alpha=1, damping=0, gram_data="pooled"),
]


def linear_experts(kind):
    """Return three experts of one linear layer, and their tasks."""
    return near_experts(*NETWORKS[kind], sizes=(40, 30, 50))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", POOLED, ids=["coin", "regmean", "undamped"])
def test_with_statistics_of_all_tasks_a_linear_network_is_the_mixture(kind, method):
    networks, tasks = linear_experts(kind)
    coded = method.make(experts_of(networks, tasks), ROW).network
    x = torch.cat(tasks)
    wanted = mixture(networks, ROW, x)
    assert_close(answers(coded, x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "option"), [(coin.Coin, "fisher_data"), (coin.RegMean, "gram_data")]
)
def test_statistics_are_of_each_experts_own_task_by_default(method, option):
    networks, tasks = linear_experts("linear")
    experts = experts_of(networks, tasks)

    def merged(**options):
        return method(**options).make(experts, ROW).network.weight

    assert torch.equal(merged(), merged(**{option: "own"}))
    assert not torch.allclose(merged(), merged(**{option: "pooled"}))
