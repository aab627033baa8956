"""Rounding while fitting: against the method written out, against rounding afterwards, and through a file."""

from copy import deepcopy

import pytest
import torch
from near_experts import (
    NETWORKS,
    PARTLY_FITTED,
    ROW,
    assert_answers_close,
    case_of,
    distance,
    experts_of,
    perceptron,
)
from torch import nn

from coin.errors import CoinWarning, ConfigurationError
from coin.merging import Average, Base, Experts, Refit, fit_adapters, merge_networks
from coin.merging.rounding import round_columns
from coin.networks import Compressed, compress
from coin.networks.adapted import Adapted
from coin.networks.delta import levels, quantise

UNIFORM = [1 / 3, 1 / 3, 1 / 3]


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_columns_are_rounded_one_by_one_and_later_ones_make_up_for_the_errors(bits):
    torch.manual_seed(bits)
    width = 140  # more than are rounded in one block
    inputs = torch.randn(2, 300, width, dtype=torch.float64)
    inputs = inputs @ torch.randn(2, width, width, dtype=torch.float64)
    metric = inputs.mT @ inputs / 300
    wanted = torch.randn(2, 3, width, dtype=torch.float64)
    scales = quantise(wanted.flatten(0, 1), bits).scale.view(2, 3)
    found = round_columns(wanted, scales, bits, metric)
    order = metric.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True).tolist()
    for group in range(2):
        weight = wanted[group].clone()
        own_scale = scales[group].double()
        for place, k in enumerate(order):
            candidates = levels(bits) * own_scale[:, None]  # [O, 2^b]
            nearest = (weight[:, k, None] - candidates).abs().argmin(1)
            level = levels(bits)[nearest]
            assert torch.equal(found[group, :, k], level)
            error = weight[:, k] - level * own_scale
            later = order[place + 1 :]
            if later:  # the minimiser over them, with this column and those before it fixed
                of_later = metric[group][later]
                share = torch.linalg.solve(of_later[:, later], of_later[:, k])
                weight[:, later] += error[:, None] * share


@pytest.mark.parametrize("kind", [*NETWORKS, *PARTLY_FITTED])
@pytest.mark.filterwarnings("ignore:method 'refit' leaves")
def test_eight_bits_are_nearly_as_good_as_none_and_go_through_a_file(kind, tmp_path):
    networks, tasks = case_of(kind)
    experts = experts_of(networks, tasks)
    method = Refit(0.03, head=False)
    made = method.coded_model(experts, ROW)
    packed = method.pack(experts, ROW, made, 8)
    # The coarsest steps between levels are 2 % of a row's largest value.
    assert_answers_close(packed.network(), made.network, tasks, 0.12)
    packed.save(tmp_path / "packed.safetensors")
    again = Compressed.load(tmp_path / "packed.safetensors", networks[0]).network()
    for name, parameter in packed.network().named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def wide():
    """A network of rows wide enough for few bits."""
    layers = (
        nn.Linear(130, 140),
        nn.ReLU(),
        nn.Linear(140, 130),
        nn.ReLU(),
        nn.Linear(130, 4),
    )
    return nn.Sequential(*layers)


def fine_tuned(make, spread=0.1):
    """Return a network, and three a little way from it."""
    torch.manual_seed(0)
    base = make().eval()
    experts = [deepcopy(base) for _ in range(3)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += spread * torch.randn_like(parameter)
    return base, experts


def correlated(samples, width):
    """Inputs of which some directions hardly matter."""
    mixing = torch.randn(width, width) * torch.linspace(0.02, 2, width)
    return torch.randn(samples, width) @ mixing


def packed_by(method, make):
    """Return the network that experts of a kind come from, their coded model, and this in few bits."""
    base, networks = fine_tuned(make)
    width = base[0].in_features
    calibration = [[torch.randn(30, width)] for _ in networks]
    merged = merge_networks(method, networks, [UNIFORM], calibration=calibration, initial=base)
    ((packed,),) = merged.compressed.values()
    return base, merged[0], packed


METHODS = {
    "average": Average(adapters={"rank": 0}),
    "base": Base(adapters={"rank": 0}),
    "refit": Refit(head=False, adapters={"rank": 0}),
}


@pytest.mark.parametrize("name", METHODS)
def test_at_few_bits_it_is_better_than_rounding_afterwards(name):
    base, networks = fine_tuned(wide, 0.005)
    inputs = [[correlated(300, 130)] for _ in networks]
    experts = Experts(networks, initial=base, calibration=inputs)
    method = METHODS[name]
    made = method.coded_model(experts, UNIFORM)
    packed = method.pack(experts, UNIFORM, made, 3)
    nearest = compress(made.network, None, bits=3, base_bits=0)
    assert packed.nbytes == nearest.nbytes + sum(each.nbytes for each in packed.adapters)
    while_fitted = Adapted(packed.network(), packed.adapters)
    afterwards = fit_adapters(nearest.network(), networks, inputs, rank=0)
    errors = {while_fitted: 0.0, afterwards: 0.0}
    for body in errors:
        for place, expert in enumerate(networks):
            plain = body.network(place, expert[-1])
            errors[body] += distance(plain, expert, inputs[place][0])
    assert errors[while_fitted] < 0.9 * errors[afterwards]


def test_a_body_that_is_not_refitted_is_rounded_to_its_own_outputs():
    method = Base(adapters={"rank": 0}, compress={"bits": 8})
    base, _, packed = packed_by(method, wide)
    assert distance(packed.network(), base, torch.randn(50, 130)) < 0.05


def test_rows_of_fewer_than_128_values_are_rounded_to_eight_bits():
    _, _, packed = packed_by(Refit(compress={"bits": 2}), lambda: perceptron(127, 128, 3))
    bits = {name: each.bits for name, each in packed.rounded.items()}
    assert bits == {"0.weight": 8, "2.weight": 2}


def test_a_matrix_of_very_many_inputs_is_rounded_to_the_nearest():
    """With a metric a layer of 9,216 inputs took 7.6 GB and 48 s where it takes 0.4 GB and 6 s."""
    _, whole, packed = packed_by(Refit(compress={"bits": 3}), lambda: perceptron(5001, 4, 3))
    nearest = quantise(whole[0].weight.detach(), 3).dense()
    assert torch.equal(packed.network()[0].weight, nearest)


def twice():
    """A network with a layer that runs twice, which no unit has."""
    layer = nn.Linear(130, 130)
    return nn.Sequential(
        nn.Linear(130, 130),
        nn.ReLU(),
        layer,
        nn.ReLU(),
        layer,
        nn.Linear(130, 3),
    )


def test_what_is_in_no_unit_is_rounded_to_the_nearest_and_the_rest_by_its_inputs():
    method = Base(adapters={"rank": 1}, compress={"bits": 2})
    message = r"'base\+rank1' leaves \d\d% of the parameters of Sequential unfitted"
    with pytest.warns(CoinWarning, match=message):
        base, _, packed = packed_by(method, twice)
    for place, is_nearest in ((0, False), (2, True)):
        nearest = quantise(base[place].weight.detach(), 2).dense()
        assert torch.equal(packed.network()[place].weight, nearest) == is_nearest


def prompted():
    """A network with a matrix without entries."""
    network = perceptron(8, 8, 3)
    network[0].prompts = nn.Parameter(torch.zeros(0, 8))
    return network


def test_a_matrix_without_entries_is_left():
    _, whole, packed = packed_by(Refit(compress={"bits": 8}), prompted)
    assert packed.packed()[0].prompts.shape == (0, 8)
    assert distance(packed.packed(), whole, torch.randn(5, 8)) < 0.05


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (3, r"expected \{bits: 4\} or so"),
        ("3bit", r"expected \{bits: 4\} or so"),
        ([3], r"expected \{bits: 4\} or so"),
        ({"bits": 3, "base_bits": 8}, r"expected \{bits: 4\} or so"),
        ([{"bits": 3}, {"bits": 3}], "expected each section once"),
    ],
)
def test_what_is_no_section_of_a_compression_is_refused(section, message):
    with pytest.raises(ConfigurationError, match=message):
        Average(compress=section)
