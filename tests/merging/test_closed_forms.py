import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coin.errors import ConfigurationError, NumericalError, StateError
from coin.merging import Average, Coin, FullFisher, GaussNewton, MergeInputs, RegMean, TaskArithmetic, Ties
from coin.merging.coin import coin_parameters
from coin.networks.batchnorm import BatchNormPolicy
from coin.statistics import FisherKind

SHAPES = {"conv.weight": (4, 2, 3, 3), "conv.bias": (4,), "norm.weight": (4,), "head.weight": (3, 5), "head.bias": (3,)}


def random_state(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for key, shape in SHAPES.items()
    }


def random_fisher(seed):
    return {key: tensor.square() for key, tensor in random_state(seed).items()}


def random_gram(seed, samples=40):
    """Gram matrices of a convolution (K = 2·9) and a head (K = 5), both with a bias."""
    generator = torch.Generator().manual_seed(seed)
    grams = {}
    for key, width in (("conv.weight", 18), ("head.weight", 5)):
        inputs = torch.randn(samples, width, generator=generator, dtype=torch.float64)
        inputs = torch.cat([inputs, torch.ones(samples, 1, dtype=torch.float64)], 1)
        grams[key] = (inputs.T @ inputs / samples)[None]
    return grams


def inputs_for(experts, count=None, seed=100):
    count = len(experts)
    return MergeInputs(
        experts,
        initial=random_state(seed),
        fishers=[random_fisher(seed + 1 + i) for i in range(count)],
        grams=[random_gram(seed + 20 + i) for i in range(count)],
    )


def assert_states_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


METHODS = [
    Average(),
    Coin(),
    Coin(damping=0),
    Coin(damping=0.3),
    RegMean(),
    RegMean("linear", alpha=0.5),
    TaskArithmetic(scale=1 / 3),
    Ties(keep=1, scale=1),
]
WEIGHTS = (0.2, 0.3, 0.5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}")
def test_identical_experts_merge_to_themselves(method):
    expert = random_state(0)
    assert_states_close(method.merge(inputs_for([expert] * 3), WEIGHTS), expert, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [*METHODS, TaskArithmetic(), Ties()], ids=lambda m: f"{m.name}")
def test_permuting_experts_with_their_weights_changes_nothing(method):
    inputs = inputs_for([random_state(i) for i in range(3)])
    order = (2, 0, 1)
    permuted = MergeInputs(
        [inputs.experts[i] for i in order],
        inputs.initial,
        [inputs.fishers[i] for i in order],
        [inputs.grams[i] for i in order],
    )
    assert_states_close(
        method.merge(permuted, [WEIGHTS[i] for i in order]), method.merge(inputs, WEIGHTS), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("method", [*METHODS, Ties()], ids=lambda m: f"{m.name}")
def test_merging_leaves_its_inputs_and_their_types(method):
    experts = [random_state(i, torch.float32) for i in range(3)]
    before = [{key: tensor.clone() for key, tensor in expert.items()} for expert in experts]
    merged = method.merge(inputs_for(experts), WEIGHTS)
    for expert, copy in zip(experts, before, strict=True):
        assert_states_close(expert, copy, rtol=0, atol=0)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}


def test_average_is_the_weighted_mean():
    experts = [random_state(i) for i in range(3)]
    merged = Average().merge(MergeInputs(experts), WEIGHTS)
    expected = {key: sum(w * e[key] for w, e in zip(WEIGHTS, experts, strict=True)) for key in SHAPES}
    assert_states_close(merged, expected)


@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.5])
def test_coin_is_the_closed_form(damping):
    inputs = inputs_for([random_state(i) for i in range(3)])
    total = {key: sum(w * f[key] for w, f in zip(WEIGHTS, inputs.fishers, strict=True)) for key in SHAPES}
    ridge = damping * torch.cat([tensor.flatten() for tensor in total.values()]).mean()
    expected = {}
    for key in SHAPES:
        pulled = sum(
            w * (f[key] + ridge) * e[key] for w, f, e in zip(WEIGHTS, inputs.fishers, inputs.experts, strict=True)
        )
        expected[key] = pulled / (total[key] + ridge)
    assert_states_close(Coin(damping).merge(inputs, WEIGHTS), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_equal_fishers_average(damping):
    experts = [random_state(i) for i in range(3)]
    for fisher in ({key: torch.ones(shape).double() for key, shape in SHAPES.items()}, random_fisher(9)):
        merged = Coin(damping).merge(MergeInputs(experts, fishers=[fisher] * 3), WEIGHTS)
        assert_states_close(merged, Average().merge(MergeInputs(experts), WEIGHTS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_without_any_fisher_the_average_stands(damping):
    inputs = inputs_for([random_state(i) for i in range(3)])
    fishers = [dict(fisher) for fisher in inputs.fishers]
    for fisher in fishers:
        fisher["head.weight"] = torch.zeros(3, 5, dtype=torch.float64)
        fisher["conv.bias"] = fisher["conv.bias"] * torch.tensor([0.0, 1.0, 1.0, 1.0])
    merged = Coin(damping).merge(MergeInputs(inputs.experts, fishers=fishers), WEIGHTS)
    average = Average().merge(MergeInputs(inputs.experts), WEIGHTS)
    torch.testing.assert_close(merged["head.weight"], average["head.weight"], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merged["conv.bias"][0], average["conv.bias"][0], rtol=1e-13, atol=1e-13)
    assert not torch.allclose(merged["conv.bias"][1:], average["conv.bias"][1:])


def test_an_entry_follows_the_only_expert_with_a_fisher_there():
    experts = [{"w": torch.tensor([1.0, 1.0]).double()}, {"w": torch.tensor([3.0, 3.0]).double()}]
    tiny = {"w": torch.tensor([0.0, 1e-300], dtype=torch.float64)}
    merged = Coin(damping=0).merge(
        MergeInputs(experts, fishers=[{"w": torch.tensor([2.0, 0.0]).double()}, tiny]), (0.5, 0.5)
    )
    assert merged["w"].tolist() == [1.0, 3.0]


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 1e6)), min_size=2, max_size=5),
    st.floats(0, 10),
)
@settings(deadline=None, derandomize=True)
def test_coin_stays_between_the_experts(entries, damping):
    count = len(entries)
    experts = [{"w": torch.tensor([value], dtype=torch.float64)} for value, _ in entries]
    fishers = [{"w": torch.tensor([fisher], dtype=torch.float64)} for _, fisher in entries]
    merged = float(Coin(damping).merge(MergeInputs(experts, fishers=fishers), [1 / count] * count)["w"])
    values = [value for value, _ in entries]
    assert min(values) - 1e-12 <= merged <= max(values) + 1e-12


def test_regmean_minimises_its_objective():
    """Against the stacked least-squares problem, written with the inputs themselves, for a layer with a bias."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(30, 5, generator=generator, dtype=torch.float64) * (i + 1) for i in range(3)]
    experts = [random_state(i) for i in range(3)]
    joined = [torch.cat([x, torch.ones(30, 1).double()], 1) for x in data]
    grams = [{"head.weight": (x.T @ x / 30)[None]} for x in joined]
    merged = RegMean(alpha=1, damping=0).merge(MergeInputs(experts, grams=grams), WEIGHTS)
    rows = torch.cat([math.sqrt(w) * x for w, x in zip(WEIGHTS, joined, strict=True)])
    targets = torch.cat(
        [
            math.sqrt(w) * (x @ torch.cat([e["head.weight"], e["head.bias"][:, None]], 1).T)
            for w, x, e in zip(WEIGHTS, joined, experts, strict=True)
        ]
    )
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(merged["head.weight"], expected[:, :-1])
    torch.testing.assert_close(merged["head.bias"], expected[:, -1])
    for key in ("conv.weight", "conv.bias", "norm.weight"):
        torch.testing.assert_close(merged[key], Average().merge(MergeInputs(experts), WEIGHTS)[key])


def test_regmean_solves_each_group_of_a_convolution_by_itself():
    experts = [random_state(i) for i in range(2)]
    generator = torch.Generator().manual_seed(5)
    factors = [torch.randn(2, 18, 30, generator=generator, dtype=torch.float64) for _ in range(2)]
    grams = [{"conv.weight": factor @ factor.mT} for factor in factors]
    merged = RegMean(alpha=1, damping=0).merge(MergeInputs(experts, grams=grams), (0.3, 0.7))
    for group in range(2):
        half = slice(2 * group, 2 * group + 2)
        total = 0.3 * grams[0]["conv.weight"][group] + 0.7 * grams[1]["conv.weight"][group]
        pulled = sum(
            w * e["conv.weight"].flatten(1)[half] @ g["conv.weight"][group]
            for w, e, g in zip((0.3, 0.7), experts, grams, strict=True)
        )
        torch.testing.assert_close(merged["conv.weight"].flatten(1)[half], torch.linalg.solve(total, pulled.T).T)
    torch.testing.assert_close(merged["conv.bias"], 0.3 * experts[0]["conv.bias"] + 0.7 * experts[1]["conv.bias"])


def test_regmean_with_alpha_zero_is_the_diagonal_merge():
    inputs = inputs_for([random_state(i) for i in range(3)])
    merged = RegMean(alpha=0, damping=0).merge(inputs, WEIGHTS)
    diagonals = [gram["head.weight"][0].diagonal() for gram in inputs.grams]
    total = sum(w * d for w, d in zip(WEIGHTS, diagonals, strict=True))
    expected = (
        sum(w * e["head.weight"] * d[:-1] for w, e, d in zip(WEIGHTS, inputs.experts, diagonals, strict=True))
        / total[:-1]
    )
    torch.testing.assert_close(merged["head.weight"], expected)


def test_regmean_of_linear_layers_leaves_convolutions_averaged():
    inputs = inputs_for([random_state(i) for i in range(3)])
    average, linear, everything = (
        method.merge(inputs, WEIGHTS) for method in (Average(), RegMean("linear"), RegMean("all"))
    )
    torch.testing.assert_close(linear["conv.weight"], average["conv.weight"])
    torch.testing.assert_close(linear["head.weight"], everything["head.weight"])
    assert not torch.allclose(everything["conv.weight"], average["conv.weight"])


def test_a_singular_gram_is_an_error_or_damped_to_the_average():
    experts = [random_state(i) for i in range(2)]
    column = torch.zeros(6, 1, dtype=torch.float64)
    column[0] = 1
    inputs = MergeInputs(experts, grams=[{"head.weight": (column @ column.T)[None]}] * 2)
    with pytest.raises(NumericalError, match=re.escape("the Gram matrix of 'head.weight' is singular")):
        RegMean(alpha=1, damping=0).merge(inputs, (0.5, 0.5))
    average = Average().merge(inputs, (0.5, 0.5))
    assert_states_close(RegMean(alpha=1, damping=1e-3).merge(inputs, (0.5, 0.5)), average)
    dead = MergeInputs(experts, grams=[{"head.weight": torch.zeros(1, 6, 6).double()}] * 2)
    assert_states_close(RegMean(alpha=1, damping=0).merge(dead, (0.5, 0.5)), average)


def test_task_arithmetic_by_hand():
    inputs = inputs_for([random_state(i) for i in range(3)])
    merged = TaskArithmetic(scale=0.4).merge(inputs, [1 / 3] * 3)
    for key, start in inputs.initial.items():
        expected = start + 0.4 * sum(expert[key] - start for expert in inputs.experts)
        torch.testing.assert_close(merged[key], expected)
    assert_states_close(TaskArithmetic(scale=1 / 3).merge(inputs, WEIGHTS), Average().merge(inputs, WEIGHTS))


def test_ties_by_hand():
    def state(*values):
        return {"w": torch.tensor(values, dtype=torch.float64)}

    experts = [state(1, 6.0, 6, 1.2), state(1, 4, -1, 7.0), state(1, -1, -2, 1.0)]
    inputs = MergeInputs(experts, initial=state(1, 1, 1, 1))
    # Task vectors (0, 5, 5, .2), (0, 3, −2, 6), (0, −2, −3, 0); half of four entries stay:
    # (0, 5, 5, 0), (0, 3, 0, 6), (0, −2, −3, 0), elected signs 0, +, +, +.
    merged = Ties(keep=0.5, scale=2).merge(inputs, [1 / 3] * 3)
    assert merged["w"].tolist() == pytest.approx([1, 1 + 2 * 4, 1 + 2 * 5, 1 + 2 * 6])
    weighted = Ties(keep=0.5, scale=1).merge(inputs, (0.2, 0.1, 0.7))
    # Now 0.2·5 + 0.1·3 − 0.7·2 < 0 elects − for the second entry, and 0.2·5 − 0.7·3 < 0 for the third.
    assert weighted["w"].tolist() == pytest.approx([1, 1 - 2, 1 - 3, 1 + 6])


BAD = [
    (lambda i: MergeInputs(i.experts), Coin(), ConfigurationError, "method 'coin' needs 'fisher'"),
    (lambda i: MergeInputs(i.experts), RegMean(), ConfigurationError, "needs 'gram'"),
    (lambda i: MergeInputs(i.experts), Ties(), ConfigurationError, "needs 'initial'"),
    (lambda i: MergeInputs(i.experts, fishers=i.fishers[:2]), Coin(), ConfigurationError, "of 2 experts, expected 3"),
]


@pytest.mark.parametrize(("change", "method", "error", "message"), BAD)
def test_missing_statistics_are_named(change, method, error, message):
    with pytest.raises(error, match=message):
        method.merge(change(inputs_for([random_state(i) for i in range(3)])), WEIGHTS)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.5, 0.5), "2 weights for 3"),
        ((0.5, 0.6, -0.1), "non-negative"),
        ((0.5, 0.5, 0.5), "sum to 1"),
        ((math.nan,) * 3, "sum to 1"),
    ],
)
def test_weights_are_checked(weights, message):
    with pytest.raises(ConfigurationError, match=message):
        Average().merge(MergeInputs([random_state(i) for i in range(3)]), weights)


def test_a_damaged_expert_or_statistic_is_named():
    def damaged(state, key, value):
        copy = {name: tensor.clone() for name, tensor in state.items()}
        copy[key].view(-1)[0] = value
        return copy

    inputs = inputs_for([random_state(i) for i in range(3)])
    experts = [inputs.experts[0], damaged(inputs.experts[1], "head.bias", math.nan), inputs.experts[2]]
    with pytest.raises(StateError, match=r"expert 1 is not finite: tensor 'head\.bias'"):
        Average().merge(MergeInputs(experts), WEIGHTS)
    for value, message in (
        (math.inf, "Fisher of expert 2 is not finite"),
        (-1.0, "Fisher of expert 2 is negative in 'conv"),
    ):
        fishers = [*inputs.fishers[:2], damaged(inputs.fishers[2], "conv.weight", value)]
        with pytest.raises(StateError, match=message):
            Coin().merge(MergeInputs(inputs.experts, fishers=fishers), WEIGHTS)
    grams = [damaged(inputs.grams[0], "head.weight", math.nan), *inputs.grams[1:]]
    with pytest.raises(StateError, match="Gram statistic of expert 0 is not finite"):
        RegMean().merge(MergeInputs(inputs.experts, grams=grams), WEIGHTS)


def test_mismatched_layouts_are_named():
    experts = [random_state(i) for i in range(2)]
    short = {key: tensor for key, tensor in experts[1].items() if key != "head.bias"}
    with pytest.raises(StateError, match=r"expert 1 has no tensor 'head\.bias'"):
        Average().merge(MergeInputs([experts[0], short]), (0.5, 0.5))
    with pytest.raises(StateError, match=r"'head\.weight' has 4 rows, expected 5, or 6 with a bias"):
        RegMean().merge(MergeInputs(experts, grams=[{"head.weight": torch.eye(4)[None]}] * 2), (0.5, 0.5))
    with pytest.raises(StateError, match=r"Gram matrix for 'tail\.weight'"):
        RegMean().merge(MergeInputs(experts, grams=[{"tail.weight": torch.eye(4)[None]}] * 2), (0.5, 0.5))
    with pytest.raises(StateError, match="3 groups, which do not divide 4 outputs; compute the Gram"):
        RegMean().merge(MergeInputs(experts, grams=[{"conv.weight": torch.ones(3, 18, 18)}] * 2), (0.5, 0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Coin(damping=-1), "damping -1"),
        (lambda: Coin(damping=math.nan), "damping nan"),
        (lambda: RegMean("conv"), "expected one of linear, all"),
        (lambda: RegMean(alpha=2), "alpha 2"),
        (lambda: Ties(keep=0), "keep 0"),
        (lambda: TaskArithmetic(scale=math.inf), "scale inf"),
        (lambda: Average(batchnorm="reset"), "batchnorm 'reset'"),
        (lambda: RegMean(gram_data="all"), "found gram_data 'all', expected one of own, pooled, or null"),
    ],
)
def test_options_are_checked_at_construction(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_labels_and_policies_are_carried():
    assert Average().label == "average"
    recalibrated = Coin(batchnorm=BatchNormPolicy.recalibrate, label="coin+BN", fisher_data="own")
    assert (recalibrated.label, recalibrated.name, recalibrated.batchnorm) == ("coin+BN", "coin", "recalibrate")
    assert recalibrated.fisher_data == "own"


@pytest.mark.parametrize("method", [Coin, FullFisher, GaussNewton])
def test_fisher_options_are_checked_at_construction(method):
    with pytest.raises(ConfigurationError, match=r"^found fisher_data 'mixed', expected one of own, pooled, or null$"):
        method(fisher_data="mixed")
    with pytest.raises(
        ConfigurationError, match=r"^found fisher_kind 'mc', expected one of exact, monte_carlo, [^\n]*$"
    ):
        method(fisher_kind="mc")
    for kind in FisherKind:
        assert method(fisher_kind=str(kind), fisher_data="pooled").fisher_kind == kind
    assert (method().fisher_kind, method().fisher_data) == (None, None)


@pytest.mark.parametrize(
    "label", ["", ".hidden", "..", "a/b", "a\\b", "two words", "line\n", "größer", "none", "oracle"]
)
def test_a_label_that_cannot_name_results_and_files_is_refused(label):
    with pytest.raises(ConfigurationError, match=r"^found label [^\n]*$"):
        Average(label=label)


@pytest.mark.parametrize("label", ["coin", "distillation-7000", "-x", "v1.2_b+c", "None"])
def test_plain_labels_are_taken_as_they_are(label):
    assert Average(label=label).label == label


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_closed_form_is_a_function_of_tensors(damping):
    inputs = inputs_for([random_state(seed) for seed in range(3)])
    weights = (0.2, 0.5, 0.3)
    found = coin_parameters(inputs.experts, inputs.fishers, weights, damping)
    total = {key: sum(w * fisher[key] for w, fisher in zip(weights, inputs.fishers, strict=True)) for key in SHAPES}
    ridge = damping * torch.cat([tensor.flatten() for tensor in total.values()]).mean()
    for key in SHAPES:
        terms = zip(weights, inputs.fishers, inputs.experts, strict=True)
        pulled = sum(w * (fisher[key] + ridge) * expert[key] for w, fisher, expert in terms)
        torch.testing.assert_close(found[key], pulled / (total[key] + ridge), rtol=1e-12, atol=1e-12)
    assert_states_close(found, Coin(damping).merge(inputs, weights), rtol=0, atol=0)
