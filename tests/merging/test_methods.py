"""What every method keeps to on networks of several kinds, damaged inputs, and options."""

import math
import re
import warnings
from copy import deepcopy

import pytest
import torch
from near_experts import answers, assert_same_tensors, mixture, near_experts, perceptron
from torch import nn
from torch.testing import assert_close

import coin
from coin.errors import CoinError, CoinWarning, ConfigurationError, NumericalError, StateError
from coin.merging import Average, Base, Coin, Experts, HeadFit, Refit, RegMean, merge_networks
from coin.networks import BatchNormPolicy
from coin.networks.small import SmallViT
from coin.statistics import fisher_sums, gram_sums

WEIGHTS = (0.2, 0.3, 0.5)
SIZES = (30, 20, 25)


def groups():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def batchnorm():
    layers = (
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return nn.Sequential(*layers)


NETWORKS = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "perceptron": (lambda: perceptron(6, 8, 3), (6,)),
    "groups": (groups, (2, 4, 4)),
    "batchnorm": (batchnorm, (2, 4, 4)),
    "vit": (lambda: SmallViT(3, 8, 4, depth=1, heads=2, width=8, mlp_width=12), (3, 8, 8)),
}
# With the tolerance to which a method solves what it solves.
METHODS = {
    "average": (Average(), 1e-12),
    "coin": (Coin(), 1e-10),
    "coin undamped": (Coin(damping=0), 1e-10),
    "regmean": (RegMean(), 1e-10),
    "regmean linear": (RegMean("linear", alpha=0.5), 1e-10),
    "head_fit": (HeadFit(), 1e-8),
    "refit": (Refit(), 1e-8),
}
every_network = pytest.mark.parametrize("kind", NETWORKS)
every_method = pytest.mark.parametrize("name", METHODS)


def parts_of(kind):
    """Return experts and their tasks."""
    make, shape = NETWORKS[kind]
    return near_experts(make, shape, SIZES)


def experts_of(networks, tasks):
    return Experts(networks, calibration=[task.split(15) for task in tasks])


def assert_same_function(network, other, tasks, tolerance):
    x = torch.cat(tasks)
    found = answers(network, x)
    assert_close(found, answers(other, x), rtol=tolerance, atol=tolerance)


@every_network
@every_method
def test_identical_experts_merge_to_themselves(kind, name):
    networks, tasks = parts_of(kind)
    network = networks[0]
    method, _ = METHODS[name]
    experts = experts_of([network, deepcopy(network), deepcopy(network)], tasks)
    coded = method.coded_model(experts, WEIGHTS).network
    assert_same_function(coded, network, tasks, 1e-9)


@every_network
@every_method
def test_permuting_experts_with_their_weights_changes_nothing(kind, name):
    networks, tasks = parts_of(kind)
    method, tolerance = METHODS[name]
    made = []
    for order in ((0, 1, 2), (2, 0, 1)):
        experts = experts_of([networks[i] for i in order], [tasks[i] for i in order])
        made.append(method.coded_model(experts, [WEIGHTS[i] for i in order]))
    one, other = made
    assert_same_function(one.network, other.network, tasks, tolerance)
    residuals = one.chosen.get("held_out_residual", {})
    assert other.chosen.get("held_out_residual", {}) == pytest.approx(residuals, rel=1e-6)


@every_network
@every_method
def test_experts_stay_and_give_their_type_and_a_network_of_its_own(kind, name):
    networks, tasks = parts_of(kind)
    networks = [network.float().train() for network in networks]
    before = deepcopy(networks)
    method, _ = METHODS[name]
    coded = method.coded_model(experts_of(networks, tasks), WEIGHTS).network
    assert not coded.training
    for parameter in coded.parameters():
        assert parameter.dtype == torch.float32
        parameter.data.zero_()
    for network, other in zip(networks, before, strict=True):
        assert all(module.training for module in network.modules())
        assert_same_tensors(network, other)


# The head


@pytest.mark.parametrize("bias", [True, False])
def test_a_fitted_head_reads_the_mixture_by_least_squares_and_nothing_else_moves(bias):
    layers = (
        nn.Linear(6, 8),
        nn.Tanh(),
        nn.Linear(8, 3, bias),
    )
    networks, tasks = near_experts(lambda: nn.Sequential(*layers), (6,), SIZES)
    experts = experts_of(networks, tasks)
    fitted = HeadFit().make(experts, WEIGHTS).network
    assert torch.equal(fitted[0].weight, Average().make(experts, WEIGHTS).network[0].weight)
    x = torch.cat(tasks)
    wanted = mixture(networks, WEIGHTS, x)
    columns = answers(fitted[:2], x)
    if bias:
        columns = torch.cat([columns, torch.ones(len(x), 1)], 1)
    best = columns @ torch.linalg.lstsq(columns, wanted).solution
    error = answers(fitted, x) - wanted
    assert error.norm() < 1.1 * (best - wanted).norm()
    if bias:  # which no ridge shrinks
        assert_close(error.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-9)


def test_a_head_of_equal_bodies_is_the_mixture_of_heads():
    networks, tasks = parts_of("perceptron")
    for network in networks:
        network[0] = networks[0][0]
    experts = experts_of(networks, tasks)
    average = Average().make(experts, WEIGHTS).network
    assert_same_function(HeadFit().make(experts, WEIGHTS).network, average, tasks, 1e-9)


def test_a_head_that_does_not_give_the_logits_is_refused():
    networks, tasks = near_experts(
        lambda: nn.Sequential(perceptron(6, 8, 3), nn.Softmax(1)), (6,), SIZES
    )
    message = r"^the logits of Sequential are not its head '0\.2' of [^\n]*$"
    with pytest.raises(StateError, match=message):
        HeadFit().make(experts_of(networks, tasks), WEIGHTS)


# Compression


@pytest.mark.parametrize("method", [Average, Refit])
def test_compressed_coded_models_stand_beside_the_whole_ones(method):
    networks, tasks = parts_of("perceptron")
    calibration = [[task] for task in tasks]
    whole = merge_networks(method(), networks, [WEIGHTS], calibration=calibration)
    assert whole.compressed == {}
    code = [WEIGHTS, (0.4, 0.3, 0.3)]
    both = method(compress=[{"bits": 8}, {"bits": 4}])
    merged = merge_networks(both, networks, code, calibration=calibration)
    assert_same_function(merged[0], whole[0], tasks, 1e-12)
    assert list(merged.compressed) == [f"{both.label}-8bit", f"{both.label}-4bit"]
    for network, packed in zip(merged, merged.compressed[f"{both.label}-8bit"], strict=True):
        assert_same_function(packed.network(), network, tasks, 0.1)


def test_every_row_is_followed_by_its_compressed_variants_and_the_cost_of_both():
    networks, tasks = parts_of("perceptron")
    method = Refit(head=False, compress=[{"bits": 8}, {"bits": 4}])
    code = coin.Code([WEIGHTS, (0.4, 0.3, 0.3)])
    experts = experts_of(networks, tasks)
    found = list(method.coded_models(experts, code))
    labels = ["refit", "refit-8bit", "refit-4bit"]
    assert [(each.row, each.label) for each in found] == [
        (row, label) for row in (0, 1) for label in labels
    ]
    for whole, *variants in (found[:3], found[3:]):
        assert whole.packed is None
        for variant in variants:
            assert variant.made is whole.made
            assert variant.seconds > whole.seconds
            assert variant.passes == whole.passes + 2 * sum(SIZES)
    assert len(list(method.coded_models(experts, code, whole_only=True))) == 2


# Damage

DAMAGED = {
    "average": Average(),
    "coin": Coin(),
    "regmean": RegMean(),
    "regmean undamped": RegMean(alpha=1, damping=0),
    "head_fit": HeadFit(),
    "refit": Refit(),
}


def damaged(damage):
    """Return three experts in float32 with everything that a method may want."""
    networks, tasks = parts_of("perceptron")
    networks = [network.float() for network in networks]
    tasks = [task.float() for task in tasks]
    if damage == "one sample a task":
        tasks = [task[:1] for task in tasks]
    elif damage == "constant inputs":
        tasks = [torch.ones_like(task) for task in tasks]
    elif damage == "outputs that overflow":
        networks[1][2].weight.data.fill_(3e38)
        networks[1][0].weight.data.mul_(100)
    pairs = list(zip(networks, tasks, strict=True))
    fishers = [fisher_sums(network, [x]).mean() for network, x in pairs]
    grams = [gram_sums(network, [x]).mean() for network, x in pairs]
    if damage == "a NaN in an expert":
        networks[1][2].bias.data[0] = torch.nan
    elif damage == "no Fisher anywhere":
        for fisher in fishers:
            for tensor in fisher.values():
                tensor.zero_()
    return Experts(networks, fishers=fishers, grams=grams, calibration=[[x] for x in tasks])


SINGULAR = (
    NumericalError,
    r"the Gram matrix of '\d\.weight' is singular with a damping of 0; raise",
)
NO_FISHER = (CoinWarning, "the Fisher of expert 0, 1, 2 is zero everywhere")
OVERFLOW = (StateError, "the fisher of expert 1 is not finite: tensor '0")
NO_LOGITS = (StateError, "the calibration output of expert 1 is not finite: tensor 'logits'")
NO_ROWS = (NumericalError, "a layer's inputs or outputs on calibration data are not finite")
# Damage → method → the error or warning that is due; where there is none, a finite network without a word.
DUE = {
    "none": {},
    "a NaN in an expert": dict.fromkeys(
        DAMAGED, (StateError, r"expert 1 is not finite: tensor '2\.bias'")
    ),
    "no Fisher anywhere": {"coin": NO_FISHER},
    "constant inputs": {"regmean undamped": SINGULAR},
    "one sample a task": {"regmean undamped": SINGULAR},
    "outputs that overflow": {"coin": OVERFLOW, "head_fit": NO_LOGITS, "refit": NO_ROWS},
}


@pytest.mark.parametrize("damage", DUE)
@pytest.mark.parametrize("name", DAMAGED)
def test_a_method_gives_a_finite_network_or_names_the_cause(damage, name):
    experts = damaged(damage)
    kind, message = DUE[damage].get(name, (None, ""))
    if kind is not None and issubclass(kind, CoinError):
        with pytest.raises(kind, match=message) as caught:
            DAMAGED[name].coded_model(experts, WEIGHTS)
        assert "\n" not in str(caught.value)
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", CoinWarning)
        coded = DAMAGED[name].coded_model(experts, WEIGHTS).network
    for parameter in coded.parameters():
        assert bool(parameter.isfinite().all())
    assert len(told) == (kind is not None)
    for each in told:
        assert re.search(message, str(each.message))


# What is refused


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Coin(), "found no calibration inputs, which the merge needs; give them as calibration"),
        (RegMean(), "found no calibration inputs, which the merge needs; give them as calibration"),
        (Refit(), "found no calibration inputs, which the merge needs; give them as calibration"),
        (
            Base(),
            "found no shared initialisation, which the method or its BatchNorm policy 'keep' needs",
        ),
        (
            Average(batchnorm="keep"),
            "found no shared initialisation, which the method or its BatchNorm",
        ),
    ],
)
def test_what_a_method_needs_is_named(method, message):
    networks, _ = parts_of("batchnorm")
    with pytest.raises(ConfigurationError, match=message):
        method.make(Experts(networks), WEIGHTS)


@pytest.mark.parametrize("wrong", [Coin, "Coin"])
def test_what_is_no_method_is_refused(wrong):
    networks, _ = parts_of("linear")
    with pytest.raises(ConfigurationError, match="expected an object of a method's class"):
        merge_networks(wrong, networks, [WEIGHTS])


@pytest.mark.parametrize("given", ["fishers", "grams", "calibration"])
def test_parts_are_of_every_expert(given):
    networks, tasks = parts_of("linear")
    parts = [{"weight": tasks[0]}] * 2
    with pytest.raises(ConfigurationError, match=f"found {given} of 2 experts, expected 3"):
        Experts(networks, **{given: parts})


@pytest.mark.parametrize(
    "row",
    [
        (0.5, 0.5),
        (0.5, 0.6, -0.1),
        (0.5, 0.5, 0.5),
        (math.nan,) * 3,
    ],
)
def test_a_row_that_is_none_of_a_code_is_refused(row):
    networks, _ = parts_of("linear")
    with pytest.raises(
        ConfigurationError, match=r"found \d weights for 3 experts, .* non-negative numbers"
    ):
        Average().coded_model(Experts(networks), row)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Coin(damping=-1), "damping=-1"),
        (
            lambda: Coin(fisher_data="mixed"),
            "^found fisher_data='mixed', expected one of own, pooled$",
        ),
        (
            lambda: Coin(fisher_kind="mc"),
            "^found fisher_kind='mc', expected one of exact, monte_carlo, ",
        ),
        (lambda: RegMean("conv"), "expected one of linear, all"),
        (lambda: RegMean(alpha=2), "alpha=2, expected a number at least 0 and at most 1"),
        (lambda: RegMean(damping=-1), "damping=-1"),
        (lambda: RegMean(gram_data="all"), "found gram_data='all', expected one of own, pooled"),
        (lambda: Refit(ridge=0.0), "found ridge=0.0, expected a number above 0"),
        (lambda: Refit(ridge=math.inf), "found ridge=inf"),
        (lambda: Refit(memory_mib=0), "found memory_mib=0, expected a whole number of at least 1"),
        (lambda: Average(batchnorm="reset"), "batchnorm='reset'"),
    ],
)
def test_options_are_checked_at_construction(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    "label", ["", ".hidden", "a/b", "a\\b", "two words", "line\n", "größer", "none", "oracle"]
)
def test_a_label_that_cannot_name_results_and_files_is_refused(label):
    with pytest.raises(ConfigurationError, match=r"^found label [^\n]*$"):
        Average(label=label)


@pytest.mark.parametrize(
    ("method", "label"),
    [
        (Average(), "average"),
        (Average(batchnorm="keep"), "average-keep"),
        (Average(batchnorm=BatchNormPolicy.keep, adapters={"rank": 4}), "average+rank4-keep"),
        (Average(adapters={"rank": 2, "scales": False}), "average+lora2"),
        (Base(), "base"),
        (Base(batchnorm="average"), "base-average"),
        (Refit(), "refit"),
        (Average(batchnorm="keep", label="-v1.2_b+c"), "-v1.2_b+c"),
    ],
)
def test_a_label_names_what_is_not_the_classs_own(method, label):
    assert method.label == label


def test_a_policy_needs_nothing_without_batchnorm():
    networks, _ = parts_of("perceptron")
    assert Average(batchnorm="keep").make(Experts(networks), WEIGHTS).chosen == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"bias": -torch.ones(4)}, "fisher of expert 1 is negative in 'bias'"),
        (
            {"bias": torch.ones(2)},
            r"fisher of expert 1 has 'bias' of \[2\], expected \[4\] of a fisher",
        ),
    ],
)
def test_a_damaged_statistic_is_named(damage, message):
    networks, _ = parts_of("linear")
    fisher = dict.fromkeys(("weight", "bias"), torch.ones(4))
    fisher["weight"] = torch.ones(4, 6)
    with pytest.raises(StateError, match=message):
        merge_networks(Coin(), networks, [WEIGHTS], fishers=[fisher, fisher | damage, fisher])


def test_gram_matrices_of_different_shapes_are_refused():
    networks, _ = parts_of("linear")
    grams = [{"weight": torch.eye(size)[None]} for size in (7, 6, 7)]
    with pytest.raises(StateError, match=r"Gram matrices of 'weight' are not of one shape"):
        merge_networks(RegMean(), networks, [WEIGHTS], grams=grams)
