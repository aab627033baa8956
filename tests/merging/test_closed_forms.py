import math
import re
from copy import deepcopy

import pytest
import torch
from torch import nn

from coin.errors import ConfigurationError, NumericalError, StateError
from coin.merging import Average, Coin, Experts, RegMean, TaskArithmetic, Ties, Wudi
from coin.merging.coin import check_fishers, coin_parameters
from coin.merging.experts import check_each
from coin.merging.regmean import regmean_parameters
from coin.merging.task_vectors import ties

SHAPES = {"conv.weight": (4, 2, 3, 3), "conv.bias": (4,), "norm.weight": (4,), "head.weight": (3, 5), "head.bias": (3,)}
WEIGHTS = (0.2, 0.3, 0.5)


def random_state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in SHAPES.items()}


def random_gram(seed, samples=40):
    """Gram matrices of a convolution (K = 2·9) and a head (K = 5), both with a bias."""
    generator = torch.Generator().manual_seed(seed)
    grams = {}
    for key, width in (("conv.weight", 18), ("head.weight", 5)):
        inputs = torch.randn(samples, width, generator=generator, dtype=torch.float64)
        inputs = torch.cat([inputs, torch.ones(samples, 1, dtype=torch.float64)], 1)
        grams[key] = (inputs.T @ inputs / samples)[None]
    return grams


EXPERTS = [random_state(i) for i in range(3)]
FISHERS = [{key: tensor.square() for key, tensor in random_state(100 + i).items()} for i in range(3)]
GRAMS = [random_gram(20 + i) for i in range(3)]
INITIAL = random_state(50)


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
    pulled = weighted(
        [{key: (f[key] + ridge) * e[key] for key in SHAPES} for f, e in zip(FISHERS, EXPERTS, strict=True)]
    )
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


def test_task_arithmetic_by_hand():
    networks, initial = [nn.Linear(5, 3).double() for _ in WEIGHTS], nn.Linear(5, 3).double()
    experts = Experts(networks, initial=initial)
    made, average = (TaskArithmetic(s).make(experts, row).network for s, row in ((0.4, [1 / 3] * 3), (1 / 3, WEIGHTS)))
    steps = sum(network.weight - initial.weight for network in networks)
    torch.testing.assert_close(made.weight, initial.weight + 0.4 * steps)
    torch.testing.assert_close(average.weight, sum(w * e.weight for w, e in zip(WEIGHTS, networks, strict=True)))


def test_ties_by_hand():
    def state(*values):
        return {"w": torch.tensor(values, dtype=torch.float64)}

    experts, initial = [state(1, 6.0, 6, 1.2), state(1, 4, -1, 7.0), state(1, -1, -2, 1.0)], state(1, 1, 1, 1)
    # Task vectors (0, 5, 5, .2), (0, 3, −2, 6), (0, −2, −3, 0); half of four entries stay:
    # (0, 5, 5, 0), (0, 3, 0, 6), (0, −2, −3, 0), elected signs 0, +, +, +.
    merged = ties(experts, initial, [1 / 3] * 3, keep=0.5, scale=2)
    assert merged["w"].tolist() == pytest.approx([1, 1 + 2 * 4, 1 + 2 * 5, 1 + 2 * 6])
    weighted = ties(experts, initial, (0.2, 0.1, 0.7), keep=0.5, scale=1)
    # Now 0.2·5 + 0.1·3 − 0.7·2 < 0 elects − for the second entry, and 0.2·5 − 0.7·3 < 0 for the third.
    assert weighted["w"].tolist() == pytest.approx([1, 1 - 2, 1 - 3, 1 + 6])


# What is refused


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Coin(), "found no calibration inputs, which the merge needs; give them as calibration"),
        (RegMean(), "found no calibration inputs"),
        (Ties(), "found no shared initialisation, which the method, its BatchNorm policy 'keep' or its compression"),
        (TaskArithmetic(), "found no shared initialisation"),
    ],
)
def test_what_a_method_needs_is_named(method, message):
    with pytest.raises(ConfigurationError, match=message):
        method.make(Experts([nn.Linear(2, 2) for _ in WEIGHTS]), WEIGHTS)


def test_parts_are_of_every_expert():
    networks = [nn.Linear(2, 2) for _ in WEIGHTS]
    fishers = [dict(network.named_parameters()) for network in networks[:2]]
    for some in (fishers, {"own": fishers}, {"own": fishers * 2, "pooled": fishers}):
        with pytest.raises(ConfigurationError, match=r"fisher statistics of [24] experts, expected 3"):
            Experts(networks, fishers=some)
    with pytest.raises(ConfigurationError, match="calibration inputs of 1 experts, expected 3"):
        Experts(networks, calibration=[[torch.zeros(3, 2)]])
    with pytest.raises(ConfigurationError, match="found no experts"):
        Experts([])


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.5, 0.5, 0.5), (math.nan,) * 3])
def test_weights_are_checked(weights):
    with pytest.raises(ConfigurationError, match=r"found \d weights for 3 experts, .* non-negative numbers"):
        Average().make(Experts([nn.Linear(2, 2) for _ in range(3)]), weights)


def test_damaged_and_mismatched_statistics_are_named():
    for value, message in ((math.inf, "Fisher of expert 2 is not finite"), (-1.0, "Fisher of expert 2 is negative in")):
        damaged = deepcopy(FISHERS)
        damaged[2]["conv.weight"].view(-1)[0] = value
        with pytest.raises(StateError, match=message):
            check_fishers(damaged, EXPERTS[0])
    short = {key: tensor for key, tensor in EXPERTS[1].items() if key != "head.bias"}
    with pytest.raises(StateError, match=r"expert 1 has no tensor 'head\.bias'"):
        check_each([EXPERTS[0], short], "expert")
    with pytest.raises(StateError, match=r"Fisher of expert 1 has a tensor 'tail', which the experts have not \(1 sup"):
        check_fishers([FISHERS[0], {**FISHERS[1], "tail": torch.ones(2)}], EXPERTS[0])
    with pytest.raises(StateError, match=r"'head\.bias' is \[2\] in the Fisher of expert 0 but \[.*\] in expert 0"):
        check_fishers([{**FISHERS[0], "head.bias": torch.ones(2)}], EXPERTS[0])
    for gram, message in (
        ({"head.weight": torch.eye(4)[None]}, r"'head\.weight' has 1 groups of 4 rows .* expected 5, or 6 with a b"),
        ({"conv.weight": torch.ones(3, 18, 18)}, "3 groups of 18 rows for 4 outputs, expected 18, .*; compute the Gr"),
    ):
        with pytest.raises(StateError, match=message):
            regmean_parameters(EXPERTS, [gram] * 3, WEIGHTS)


# Options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Coin(damping=-1), "damping=-1"),
        (lambda: RegMean("conv"), "expected one of linear, all"),
        (lambda: RegMean(alpha=2), "alpha=2, expected a number at least 0 and at most 1"),
        (lambda: Ties(keep=0), "keep=0, expected a number above 0 and at most 1"),
        (lambda: TaskArithmetic(scale=math.inf), "scale=inf, expected a number that is finite"),
        (lambda: Wudi(damping=0.0), "damping=0.0, expected a number above 0"),
        (lambda: Average(batchnorm="reset"), "batchnorm='reset'"),
        (lambda: RegMean(gram_data="all"), "found gram_data='all', expected one of own, pooled, auto"),
        (lambda: Coin(fisher_data="mixed"), "^found fisher_data='mixed', expected one of own, pooled, auto$"),
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
