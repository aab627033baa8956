"""What every method keeps to on networks of several kinds, damaged inputs, and options."""

import math
import re
import warnings
from copy import deepcopy

import pytest
import torch
from near_experts import (
    ROW,
    answers,
    assert_same_tensors,
    case_of,
    experts_of,
    mixture,
    near_experts,
    perceptron,
)
from torch import nn
from torch.testing import assert_close

from coin.coding import Code
from coin.errors import CoinError, CoinWarning, ConfigurationError, NumericalError, StateError
from coin.merging import Average, Base, Coin, Experts, HeadFit, Refit, RegMean, merge_networks
from coin.networks import BatchNormPolicy
from coin.statistics import fisher_sums, gram_sums

SIZES = (30, 20, 25)
KINDS = [
    "more unknowns",
    "two layers",
    "groups",
    "convolutions",
    "attention",
    "encoder layer",
    "vit",
    "read in pieces",
]
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
every_network = pytest.mark.parametrize("kind", KINDS)
every_method = pytest.mark.parametrize("name", METHODS)


def assert_same_function(network, other, tasks, tolerance):
    x = torch.cat(tasks)
    found = answers(network, x)
    assert_close(found, answers(other, x), rtol=tolerance, atol=tolerance)


@every_network
@every_method
def test_identical_experts_merge_to_themselves(kind, name):
    networks, tasks = case_of(kind, SIZES)
    method, _ = METHODS[name]
    twins = [deepcopy(networks[0]) for _ in ROW]
    coded = method.coded_model(experts_of(twins, tasks), ROW).network
    assert_same_function(coded, networks[0], tasks, 1e-9)


@every_network
@every_method
def test_permuting_experts_with_their_weights_changes_nothing(kind, name):
    networks, tasks = case_of(kind, SIZES)
    method, tolerance = METHODS[name]
    made = []
    for order in ((0, 1, 2), (2, 0, 1)):
        experts = experts_of([networks[i] for i in order], [tasks[i] for i in order])
        made.append(method.coded_model(experts, [ROW[i] for i in order]))
    one, other = made
    assert_same_function(one.network, other.network, tasks, tolerance)
    residuals = one.chosen.get("held_out_residual", {})
    assert other.chosen.get("held_out_residual", {}) == pytest.approx(residuals, rel=1e-6)


@every_network
@every_method
def test_experts_stay_and_give_their_type_and_a_network_of_its_own(kind, name):
    networks, tasks = case_of(kind)
    networks = [network.float().train() for network in networks]
    before = deepcopy(networks)
    method, _ = METHODS[name]
    coded = method.coded_model(experts_of(networks, tasks), ROW).network
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
    fitted = HeadFit().make(experts, ROW).network
    assert torch.equal(fitted[0].weight, Average().make(experts, ROW).network[0].weight)
    x = torch.cat(tasks)
    wanted = mixture(networks, ROW, x)
    columns = answers(fitted[:2], x)
    if bias:
        columns = torch.cat([columns, torch.ones(len(x), 1)], 1)
    best = columns @ torch.linalg.lstsq(columns, wanted).solution
    error = answers(fitted, x) - wanted
    assert error.norm() < 1.1 * (best - wanted).norm()
    if bias:  # which no ridge shrinks
        assert_close(error.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-9)


def test_a_head_that_does_not_give_the_logits_is_refused():
    layers = (
        perceptron(6, 8, 3),
        nn.Softmax(1),
    )
    networks, tasks = near_experts(lambda: nn.Sequential(*layers), (6,))
    message = r"^the logits of Sequential are not its head '0\.2' of [^\n]*$"
    with pytest.raises(StateError, match=message):
        HeadFit().make(experts_of(networks, tasks), ROW)


# Compression


@pytest.mark.parametrize(("kind", "passes"), [(Average, 0), (Refit, 3 * sum(SIZES))])
def test_every_row_is_followed_by_its_compressed_variants_and_the_cost_of_both(kind, passes):
    networks, tasks = case_of("two layers", SIZES)
    method = kind(compress=[{"bits": 8}, {"bits": 4}])
    experts = experts_of(networks, tasks)
    code = Code([ROW, (0.4, 0.3, 0.3)])
    found = list(method.coded_models(experts, code))
    labels = [method.name, f"{method.name}-8bit", f"{method.name}-4bit"]
    assert [each.label for each in found] == 2 * labels
    assert [each.row for each in found] == [0, 0, 0, 1, 1, 1]
    for whole, *variants in (found[:3], found[3:]):
        assert whole.packed is None
        assert_same_function(variants[0].packed.network(), whole.made.network, tasks, 0.1)
        for variant in variants:
            assert variant.made is whole.made
            assert variant.seconds > whole.seconds
            assert variant.passes == whole.passes + passes
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
    networks, tasks = near_experts(lambda: perceptron(6, 8, 3), (6,), SIZES)
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


SINGULAR = (NumericalError, r"Gram matrix of '\d\.weight' is singular with a damping of 0; raise")
NO_FISHER = (CoinWarning, "the Fisher of expert 0, 1, 2 is zero everywhere")
OVERFLOW = (StateError, "the fisher of expert 1 is not finite: tensor '0")
NO_LOGITS = (StateError, "the calibration output of expert 1 is not finite: tensor 'logits'")
NO_ROWS = (NumericalError, "a layer's inputs or outputs on calibration data are not finite")
NO_NUMBER = (StateError, r"expert 1 is not finite: tensor '2\.bias'")
# Damage → method → the error or warning that is due; where there is none, a finite network without a word.
DUE = {
    "none": {},
    "a NaN in an expert": dict.fromkeys(DAMAGED, NO_NUMBER),
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
            DAMAGED[name].coded_model(experts, ROW)
        assert "\n" not in str(caught.value)
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", CoinWarning)
        coded = DAMAGED[name].coded_model(experts, ROW).network
    for parameter in coded.parameters():
        assert bool(parameter.isfinite().all())
    assert len(told) == (kind is not None)
    for each in told:
        assert re.search(message, str(each.message))


# What is refused

NO_INPUTS = "found no calibration inputs, which the merge needs; give them as calibration"
NO_START = "found no shared initialisation, which the method or its BatchNorm policy 'keep' needs"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Coin(), NO_INPUTS),
        (RegMean(), NO_INPUTS),
        (Refit(), NO_INPUTS),
        (Base(), NO_START),
        (Average(batchnorm="keep"), NO_START),
    ],
)
def test_what_a_method_needs_is_named(method, message):
    networks, _ = case_of("convolutions")
    with pytest.raises(ConfigurationError, match=message):
        method.make(Experts(networks), ROW)


def test_what_is_no_method_is_refused():
    networks, _ = case_of("two layers")
    with pytest.raises(ConfigurationError, match="expected an object of a method's class"):
        merge_networks(Coin, networks, [ROW])


@pytest.mark.parametrize("given", ["fishers", "grams", "calibration"])
def test_parts_are_of_every_expert(given):
    networks, tasks = case_of("two layers")
    with pytest.raises(ConfigurationError, match=f"found {given} of 2 experts, expected 3"):
        Experts(networks, **{given: tasks[:2]})


@pytest.mark.parametrize("row", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.5, 0.5, 0.5), (math.nan,) * 3])
def test_a_row_that_is_none_of_a_code_is_refused(row):
    networks, _ = case_of("two layers")
    message = r"found \d weights for 3 experts, .* non-negative numbers"
    with pytest.raises(ConfigurationError, match=message):
        Average().coded_model(Experts(networks), row)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Coin, {"damping": -1}, "damping=-1"),
        (Coin, {"fisher_data": "mixed"}, "'mixed', expected one of own, pooled$"),
        (Coin, {"fisher_kind": "mc"}, "'mc', expected one of exact, monte_carlo, "),
        (RegMean, {"layers": "conv"}, "expected one of linear, all"),
        (RegMean, {"alpha": 2}, "alpha=2, expected a number at least 0 and at most 1"),
        (RegMean, {"damping": -1}, "damping=-1"),
        (RegMean, {"gram_data": "all"}, "gram_data='all', expected one of own, pooled"),
        (Refit, {"ridge": 0.0}, "found ridge=0.0, expected a number above 0"),
        (Refit, {"ridge": math.inf}, "found ridge=inf"),
        (Refit, {"memory_mib": 0}, "memory_mib=0, expected a whole number of at least 1"),
        (Average, {"batchnorm": "reset"}, "batchnorm='reset'"),
        (Average, {"label": ""}, "found label ''"),
        (Average, {"label": ".hidden"}, r"^found label [^\n]*$"),
        (Average, {"label": "a/b"}, r"^found label [^\n]*$"),
        (Average, {"label": "two words"}, r"^found label [^\n]*$"),
        (Average, {"label": "line\n"}, r"^found label [^\n]*$"),
        (Average, {"label": "größer"}, r"^found label [^\n]*$"),
        (Average, {"label": "none"}, r"^found label [^\n]*$"),
        (Average, {"label": "oracle"}, r"^found label [^\n]*$"),
    ],
)
def test_options_are_checked_at_construction(method, options, message):
    with pytest.raises(ConfigurationError, match=message):
        method(**options)


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
    networks, _ = case_of("two layers")
    assert Average(batchnorm="keep").make(Experts(networks), ROW).chosen == {}


STATISTICS = {
    "fishers": {"weight": torch.ones(4, 6), "bias": torch.ones(4)},
    "grams": {"weight": torch.eye(7)[None]},
}


@pytest.mark.parametrize(
    ("method", "given", "damage", "message"),
    [
        (Coin(), "fishers", {"bias": -torch.ones(4)}, "fisher of expert 1 is negative in 'bias'"),
        (Coin(), "fishers", {"bias": torch.ones(2)}, r"1 has 'bias' of \[2\], expected \[4\] of a"),
        (RegMean(), "grams", {"weight": torch.eye(6)[None]}, "of 'weight' are not of one shape"),
    ],
)
def test_a_damaged_statistic_is_named(method, given, damage, message):
    networks = [nn.Linear(6, 4) for _ in ROW]
    own = STATISTICS[given]
    with pytest.raises(StateError, match=message):
        merge_networks(method, networks, [ROW], **{given: [own, own | damage, own]})
