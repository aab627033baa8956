"""What is chosen on held-out samples; what distillation may start from; how far experts are apart."""

import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

import coin
from coin.errors import CoinWarning, ConfigurationError, DataError, NumericalError
from coin.merging import Average, Coin, Experts, RegMean
from coin.merging.expert_sources import FAR, spread
from coin.networks import recalibrate

PAIR = (0.9, 0.1)
BN_SAMPLES, BN_HELD_OUT = 80, 16  # of both tasks


def same(first, second):
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


# BatchNorm


def batchnorm_networks(better):
    """Two experts of one function whose average is right with the average of their statistics, or with new ones."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 2), nn.BatchNorm2d(6), nn.ReLU()]
    first = nn.Sequential(*body, nn.AvgPool2d(3), nn.Flatten(), nn.Linear(6, 3)).double()
    calibration = [(3 + 4 * torch.randn(40, 2, 6, 6, generator=draw, dtype=torch.float64)).split(8) for _ in range(2)]
    second = deepcopy(first)
    if better == "recalibrate":
        # Trained along: the second's convolutions are 50 times larger, which its statistics take back. The average of
        # the variances is not the variance of the average.
        for layer in (second[0], second[3]):
            layer.weight.data.mul_(50)
            layer.bias.data.mul_(50)
        for network in (first, second):
            recalibrate(network, coin.Experts([network] * 2, calibration=calibration).pooled)
    else:
        # Frozen: they were another data set's, and the later layers have learnt to live with them.
        for layer in (second[1], second[4]):
            layer.running_mean.add_(0.01)
    return [first.eval(), second.eval()], calibration


@torch.no_grad()
def residual(coded, networks, inputs):
    """‖f_c − Σβ_i f_i‖ / ‖Σβ_i f_i‖ for the row `PAIR`."""
    wanted = sum(weight * network(inputs) for weight, network in zip(PAIR, networks, strict=True))
    return float((coded(inputs) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("better", ["average", "recalibrate"])
def test_auto_takes_the_batchnorm_policy_with_the_smaller_held_out_residual(better):
    networks, calibration = batchnorm_networks(better)
    experts = Experts(networks, calibration=calibration)
    made = Average().make(experts, PAIR)
    other, fixed, found = Experts(networks, calibration=calibration), {}, {}
    for policy in ("average", "recalibrate"):
        fixed[policy] = Average(batchnorm=policy).make(other, PAIR).network
        trial = deepcopy(fixed[policy])
        if policy == "recalibrate":  # what is judged has not seen the samples that judge it
            recalibrate(trial, other.split[0])
        found[policy] = residual(trial, networks, torch.cat(list(other.split[1])))
    (worse,) = {"average", "recalibrate"} - {better}
    assert found[better] < 0.1 < 0.3 < found[worse]
    assert made.chosen == {"batchnorm": better, "held_out_residual": pytest.approx(found, rel=1e-10)}
    assert same(made.network, fixed[better])
    assert not same(made.network, fixed[worse])
    # The experts and both candidates on the held-out samples; the statistics on the others, and at last on all.
    passes = 4 * BN_HELD_OUT + (BN_SAMPLES - BN_HELD_OUT) + (BN_SAMPLES if better == "recalibrate" else 0)
    assert experts.passes == passes
    Average().make(experts, (0.5, 0.5))
    assert experts.passes - passes == passes - 2 * BN_HELD_OUT  # the experts are run once for all rows


def test_statistics_that_all_experts_share_stay_to_the_last_bit():
    networks, calibration = batchnorm_networks("average")
    networks.append(deepcopy(networks[0]))
    shared = {name: 0.1 + torch.rand_like(each) for name, each in networks[0].named_buffers() if each.ndim}
    for network in networks:
        for name, tensor in shared.items():
            network.get_buffer(name).copy_(tensor)
    experts = Experts(networks, calibration=[*calibration, calibration[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = Average().make(experts, (0.1, 0.2, 0.7))
    assert made.chosen == {"batchnorm": "same"}
    assert experts.passes == 0
    for name, tensor in shared.items():
        assert torch.equal(made.network.get_buffer(name), tensor), name


def test_without_calibration_data_auto_averages_with_a_warning():
    networks, _ = batchnorm_networks("recalibrate")
    with pytest.warns(CoinWarning, match=r"^found no calibration inputs, needed by method 'soup' [^\n]*average"):
        made = Average(label="soup").make(Experts(networks), PAIR)
    assert made.chosen == {"batchnorm": "average"}
    assert same(made.network, Average(batchnorm="average").make(Experts(networks), PAIR).network)


def test_a_policy_whose_outputs_are_not_finite_is_not_taken(monkeypatch):
    networks, calibration = batchnorm_networks("average")
    run = Experts.run
    for second, wanted in ((1.0, "recalibrate"), (torch.inf, None)):
        factors = iter([1.0, 1.0, torch.nan, second])  # of both experts' logits, and of the two policies'

        def spoiled(experts, *given, factors=factors):
            found = run(experts, *given)
            return found._replace(logits=found.logits * next(factors))

        monkeypatch.setattr(Experts, "run", spoiled)
        experts = Experts(networks, calibration=calibration)
        if wanted is None:
            with pytest.raises(NumericalError, match="the outputs of method 'average' on held-out calibration samples"):
                Average().make(experts, PAIR)
        else:
            assert Average().make(experts, PAIR).chosen["batchnorm"] == wanted


# The data of statistics


def linear_networks():
    """Two linear experts whose tasks' inputs have little in common."""
    torch.manual_seed(0)
    networks = [nn.Linear(6, 4).double() for _ in range(2)]
    draw = torch.Generator().manual_seed(1)
    scales = torch.tensor([[3, 3, 3, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 3, 3, 3]], dtype=torch.float64)
    return networks, [(scale * torch.randn(20, 6, generator=draw, dtype=torch.float64)).split(8) for scale in scales]


@pytest.mark.parametrize(("kind", "option"), [(Coin, "fisher_data"), (partial(RegMean, alpha=1), "gram_data")])
def test_pooled_statistics_of_a_linear_layer_are_exact_and_own_ones_are_the_default(kind, option):
    networks, calibration = linear_networks()
    inputs, row, made, errors = torch.cat([batch for task in calibration for batch in task]), (0.5, 0.5), {}, {}
    with torch.no_grad():
        target = sum(weight * network(inputs) for weight, network in zip(row, networks, strict=True))
    for data in ("own", "pooled", None):
        made[data] = kind(damping=0, **{option: data}).make(Experts(networks, calibration=calibration), row)
        with torch.no_grad():
            errors[data] = float((made[data].network(inputs) - target).norm() / target.norm())
    assert errors["pooled"] < 1e-10
    assert errors["own"] > 0.1
    assert same(made[None].network, made["own"].network)


def test_samples_of_unlike_shapes_merge_and_what_is_no_input_is_told():
    networks = [nn.Sequential(nn.EmbeddingBag(9, 6), nn.Linear(6, 3)) for _ in range(2)]
    draw = torch.Generator().manual_seed(0)
    ragged = [[torch.randint(9, (10, length), generator=draw) for length in (4, 7)] for _ in range(2)]
    experts = Experts(networks, calibration=ragged)
    assert [tuple(batch.shape) for batch in experts.pooled] == [(10, 4), (10, 4), (10, 7), (10, 7)]
    assert experts.tasks.tolist() == [0, 1] * 20
    assert Average().make(experts, PAIR).network(ragged[0][1]).shape == (10, 3)
    labelled = [[(batch, torch.zeros(10)) for batch in batches] for batches in ragged]
    for given, expected in zip(Experts(networks, calibration=labelled).pooled, experts.pooled, strict=True):
        assert torch.equal(given, expected)
    assert set(Experts([*networks, networks[0]], calibration=[*ragged, []]).tasks.tolist()) == {0, 1}
    with pytest.raises(DataError, match="found no calibration batches, expected at least one"):
        Experts(networks, calibration=[[], []])
    with pytest.raises(DataError, match=r"found a tensor for a task's calibration, expected its batches; write \[ten"):
        Experts(networks, calibration=[ragged[0][0], ragged[1][0]])


# Starts


@pytest.mark.parametrize("start", ["refined", "ties", "distillation", "user_method", 3, {"class_path": "Refit"}])
def test_a_start_is_a_closed_form_by_its_name(start):
    with pytest.raises(ConfigurationError, match=r"^found start=.*, expected one of auto, average, head_fit, coin, re"):
        coin.Distillation(start=start)


def test_the_spread_is_the_median_of_the_matrices_whatever_the_head():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    networks = [deepcopy(base) for _ in range(3)]
    for sign, network in zip((1, 0, -1), networks, strict=True):
        for layer, share in zip((0, 2, 4), (1, 1, 1000), strict=True):
            network[layer].weight.data *= 1 + sign * share * FAR
    found = [dict(network.named_parameters()) for network in networks]
    assert spread(found, (0.5, 0.0, 0.5)) == pytest.approx(FAR)


@pytest.mark.filterwarnings("error")
def test_experts_that_agree_or_have_no_matrix_are_not_apart():
    state = {"weight": torch.randn(3, 2, requires_grad=True), "bias": torch.randn(3)}
    torch.set_warn_always(True)  # of parameters that are trained
    try:
        assert spread([state, state], (0.3, 0.7)) == pytest.approx(0, abs=1e-12)
    finally:
        torch.set_warn_always(False)
    assert spread([{"bias": torch.ones(3)}, {"bias": torch.zeros(3)}], (0.5, 0.5)) == 0
    assert spread([{"weight": torch.zeros(3, 2)}] * 2, (0.5, 0.5)) == 0
