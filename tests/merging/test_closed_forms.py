"""The closed forms against their formulas, written out or minimised by force, and what they refuse."""

import math
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call

import coin
from coin.errors import ConfigurationError, NumericalError, StateError
from coin.merging import Average, Base, Coin, Experts, Refit, RegMean
from coin.merging.coin import coin_parameters
from coin.merging.regmean import regmean_parameters
from coin.statistics import fisher_diagonal, gram_sums

SHAPES = {"conv.weight": (4, 2, 3, 3), "conv.bias": (4,), "norm.weight": (4,), "head.weight": (3, 5), "head.bias": (3,)}
WEIGHTS = (0.2, 0.3, 0.5)


def random_state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in SHAPES.items()}


def random_gram(seed, samples=40):
    """Gram matrices of a convolution (K = 2·9) and a head (K = 5), both with a bias."""
    generator, grams = torch.Generator().manual_seed(seed), {}
    for key, width in (("conv.weight", 18), ("head.weight", 5)):
        inputs = torch.randn(samples, width, generator=generator, dtype=torch.float64)
        inputs = torch.cat([inputs, torch.ones(samples, 1, dtype=torch.float64)], 1)
        grams[key] = (inputs.T @ inputs / samples)[None]
    return grams


EXPERTS = [random_state(i) for i in range(3)]
FISHERS = [{key: tensor.square() for key, tensor in random_state(100 + i).items()} for i in range(3)]
GRAMS = [random_gram(20 + i) for i in range(3)]


def assert_states_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


def weighted(states, weights=WEIGHTS):
    return {key: sum(w * state[key] for w, state in zip(weights, states, strict=True)) for key in states[0]}


@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.5])
def test_coin_is_the_closed_form(damping):
    equal = coin_parameters(EXPERTS, [FISHERS[0]] * 3, WEIGHTS, damping)
    assert_states_close(equal, weighted(EXPERTS), rtol=1e-12, atol=1e-12)
    total = weighted(FISHERS)
    ridge = damping * torch.cat([tensor.flatten() for tensor in total.values()]).mean()
    both = zip(FISHERS, EXPERTS, strict=True)
    pulled = weighted([{key: (f[key] + ridge) * e[key] for key in SHAPES} for f, e in both])
    expected = {key: pulled[key] / (total[key] + ridge) for key in SHAPES}
    assert_states_close(coin_parameters(EXPERTS, FISHERS, WEIGHTS, damping), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_without_any_fisher_the_average_stands(damping):
    fishers = [dict(fisher) for fisher in FISHERS]
    for fisher in fishers:
        fisher["head.weight"] = torch.zeros(3, 5, dtype=torch.float64)
        fisher["conv.bias"] = fisher["conv.bias"] * torch.tensor([0.0, 1.0, 1.0, 1.0])
    merged, average = coin_parameters(EXPERTS, fishers, WEIGHTS, damping), weighted(EXPERTS)
    torch.testing.assert_close(merged["head.weight"], average["head.weight"], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merged["conv.bias"][0], average["conv.bias"][0], rtol=1e-13, atol=1e-13)
    assert not torch.allclose(merged["conv.bias"][1:], average["conv.bias"][1:])


def test_regmean_solves_each_group_of_a_convolution_by_itself():
    generator = torch.Generator().manual_seed(5)
    factors = [torch.randn(2, 18, 30, generator=generator, dtype=torch.float64) for _ in range(2)]
    grams = [{"conv.weight": factor @ factor.mT} for factor in factors]
    merged = regmean_parameters(EXPERTS[:2], grams, (0.3, 0.7), alpha=1, damping=0)
    for group in range(2):
        half = slice(2 * group, 2 * group + 2)
        total = 0.3 * grams[0]["conv.weight"][group] + 0.7 * grams[1]["conv.weight"][group]
        pulled = sum(
            w * e["conv.weight"].flatten(1)[half] @ g["conv.weight"][group]
            for w, e, g in zip((0.3, 0.7), EXPERTS[:2], grams, strict=True)
        )
        torch.testing.assert_close(merged["conv.weight"].flatten(1)[half], torch.linalg.solve(total, pulled.T).T)
    torch.testing.assert_close(merged["conv.bias"], 0.3 * EXPERTS[0]["conv.bias"] + 0.7 * EXPERTS[1]["conv.bias"])


def test_regmean_of_linear_layers_leaves_convolutions_averaged():
    linear, everything = (regmean_parameters(EXPERTS, GRAMS, WEIGHTS, layers=layers) for layers in ("linear", "all"))
    torch.testing.assert_close(linear["conv.weight"], weighted(EXPERTS)["conv.weight"])
    torch.testing.assert_close(linear["head.weight"], everything["head.weight"])
    assert not torch.allclose(everything["conv.weight"], linear["conv.weight"])


def test_a_singular_gram_is_an_error_or_damped_to_the_average():
    column = torch.zeros(6, 1, dtype=torch.float64)
    column[0] = 1
    grams = [{"head.weight": (column @ column.T)[None]}] * 3
    with pytest.raises(NumericalError, match=re.escape("the Gram matrix of 'head.weight' is singular")):
        regmean_parameters(EXPERTS, grams, WEIGHTS, alpha=1, damping=0)
    average = weighted(EXPERTS)
    assert_states_close(regmean_parameters(EXPERTS, grams, WEIGHTS, alpha=1, damping=1e-3), average)
    dead = [{"head.weight": torch.zeros(1, 6, 6).double()}] * 3
    assert_states_close(regmean_parameters(EXPERTS, dead, WEIGHTS, alpha=1, damping=0), average)


@pytest.mark.parametrize("width", [8, 128])
def test_a_gram_matrix_that_rounding_hides_is_singular_all_the_same(width):
    """One sample short of full rank, Cholesky's last pivot is rounding noise, positive as often as not."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        data = torch.randn(width - 1, width, generator=generator, dtype=torch.float64)
        experts = [{"w.weight": torch.randn(3, width, generator=generator, dtype=torch.float64)} for _ in range(2)]
        grams = [{"w.weight": (data.T @ data)[None]}] * 2
        with pytest.raises(NumericalError, match="singular"):
            regmean_parameters(experts, grams, (0.5, 0.5), alpha=1, damping=0)
        assert torch.isfinite(regmean_parameters(experts, grams, (0.5, 0.5))["w.weight"]).all()


# With the statistics of networks

NETWORKS = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Flatten()), (3, 6)),
    "strided convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Flatten()), (2, 5, 5)),
    "grouped convolution": (lambda: nn.Sequential(nn.Conv2d(4, 6, (3, 2), groups=2), nn.Flatten()), (4, 4, 4)),
    "convolution in time": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, bias=False), nn.Flatten()), (2, 6)),
}


def networks_and_data(name):
    make, shape = NETWORKS[name]
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(make().double())
    data = [torch.randn(20, *shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    return networks, [{k: v.detach() for k, v in network.named_parameters()} for network in networks], data


@pytest.mark.parametrize("name", NETWORKS)
def test_a_linear_network_on_pooled_data_reaches_the_mixture(name):
    networks, experts, data = networks_and_data(name)
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
    networks, experts, data = networks_and_data(name)
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


def test_the_base_is_the_initialisation_with_buffers_by_the_policy():
    initial, *experts = (nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double() for _ in range(4))
    for index, each in enumerate([initial, *experts]):
        each[1].running_mean.fill_(float(index))
    for policy, mean in (("keep", 0.0), ("average", 0.2 * 1 + 0.3 * 2 + 0.5 * 3)):
        (made,) = coin.merge_networks(coin.Base(batchnorm=policy), experts, [WEIGHTS], initial=initial)
        torch.testing.assert_close(made[1].running_mean, torch.full((5,), mean, dtype=torch.float64))
        assert all(torch.equal(made.get_parameter(name), value) for name, value in initial.named_parameters())


# What is refused


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([Coin(), RegMean(), Refit()], "found no calibration inputs, which the merge needs; give them as calibration"),
        (
            [Base()],
            "found no shared initialisation, which the method or its BatchNorm policy 'keep' needs",
        ),
    ],
)
def test_what_a_method_needs_is_named(methods, message):
    calibration = None if Coin in map(type, methods) else [[torch.randn(9, 2)]] * 3
    for method in methods:
        with pytest.raises(ConfigurationError, match=message):
            method.make(Experts([nn.Linear(2, 2) for _ in WEIGHTS], calibration=calibration), WEIGHTS)


def test_parts_are_of_every_expert():
    networks = [nn.Linear(2, 2) for _ in WEIGHTS]
    fishers = [dict(network.named_parameters()) for network in networks[:2]]
    with pytest.raises(ConfigurationError, match="fishers of 2 experts, expected 3"):
        Experts(networks, fishers=fishers)
    with pytest.raises(ConfigurationError, match="calibration of 1 experts, expected 3"):
        Experts(networks, calibration=[[torch.zeros(3, 2)]])


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.5, 0.5, 0.5), (math.nan,) * 3])
def test_weights_are_checked(weights):
    with pytest.raises(ConfigurationError, match=r"found \d weights for 3 experts, .* non-negative numbers"):
        Average().coded_model(Experts([nn.Linear(2, 2) for _ in range(3)]), weights)


def test_damaged_and_mismatched_statistics_are_named():
    networks, batch = [nn.Sequential(nn.Linear(4, 3)) for _ in range(2)], torch.randn(9, 4)
    fisher, gram = fisher_diagonal(networks[0], [batch]), gram_sums(networks[0], [batch]).mean()
    for kind, method, state, message in (
        ("fishers", Coin(), {**fisher, "0.bias": torch.full((3,), math.inf)}, "fisher of expert 1 is not finite"),
        ("fishers", Coin(), {**fisher, "0.bias": -torch.ones(3)}, "fisher of expert 1 is negative in '0.bias'"),
        ("fishers", Coin(), {**fisher, "tail": torch.ones(2)}, "fisher of expert 1 has a tensor 'tail', which Seq"),
        ("fishers", Coin(), {**fisher, "0.bias": torch.ones(2)}, r"expert 1 has '0\.bias' of \[2\], expected \[3\] of"),
        ("fishers", Coin(), gram, r"the fisher of expert 1 has '0\.weight' of .* of a fisher; give the network's own"),
        ("grams", RegMean(), {"0.weight": torch.eye(4)[None]}, r"Gram matrices of '0\.weight' are not of one shape"),
    ):
        given = {kind: [fisher if kind == "fishers" else gram, state]}
        with pytest.raises(StateError, match=message):
            coin.merge_networks(method, networks, [[0.5, 0.5]], **given)
    networks[1].append(nn.Linear(3, 3))
    with pytest.raises(StateError, match=r"'expert 1' has a tensor '1\.bias' too many"):
        Average().coded_model(Experts(networks), (0.5, 0.5))
    for gram, message in (
        ({"head.weight": torch.eye(4)[None]}, r"'head\.weight' has 1 groups of 4 rows .* expected 5, or 6 with a b"),
        ({"conv.weight": torch.ones(3, 18, 18)}, "3 groups of 18 rows for 4 outputs, expected 18, .*; compute the Gr"),
    ):
        with pytest.raises(StateError, match=message):
            regmean_parameters(EXPERTS, [gram] * 3, WEIGHTS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Coin(damping=-1), "damping=-1"),
        (lambda: RegMean("conv"), "expected one of linear, all"),
        (lambda: RegMean(alpha=2), "alpha=2, expected a number at least 0 and at most 1"),
        (lambda: Refit(ridge=0.0), "found ridge=0.0, expected a number above 0"),
        (lambda: Refit(ridge=math.inf), "found ridge=inf"),
        (lambda: Refit(memory_mib=0), "found memory_mib=0, expected a whole number of at least 1"),
        (lambda: Average(batchnorm="reset"), "batchnorm='reset'"),
        (lambda: RegMean(gram_data="all"), "found gram_data='all', expected one of own, pooled"),
        (lambda: Coin(fisher_data="mixed"), "^found fisher_data='mixed', expected one of own, pooled$"),
        (lambda: Coin(fisher_kind="mc"), "^found fisher_kind='mc', expected one of exact, monte_carlo, "),
    ],
)
def test_options_are_checked_at_construction(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize("label", ["", ".hidden", "a/b", "a\\b", "two words", "line\n", "größer", "none", "oracle"])
def test_a_label_that_cannot_name_results_and_files_is_refused(label):
    with pytest.raises(ConfigurationError, match=r"^found label [^\n]*$"):
        Average(label=label)
    assert Average(label="-v1.2_b+c").label == "-v1.2_b+c"


def test_a_policy_that_is_not_the_class_s_own_is_in_the_label_unless_one_is_given():
    for kind, policy, label in (
        (Average, "auto", "average"), (Average, "keep", "average-keep"), (coin.Base, "keep", "base"),
        (coin.Base, "average", "base-average"), (coin.Refit, None, "refit"),
    ):  # fmt: skip
        own = {} if policy is None else {"batchnorm": policy}
        assert kind(**own).label == label
        assert kind(**own, label="mine").label == "mine"
    assert Average(batchnorm="keep", adapters={"rank": 4}).label == "average+rank4-keep"
