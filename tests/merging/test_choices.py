"""What is chosen on held-out calibration samples: BatchNorm's policy, the data of statistics, RegMean's options."""

import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn

from coin.errors import CoinWarning, ConfigurationError, DataError, NumericalError
from coin.merging import Average, Coin, Experts, RegMean
from coin.merging.closed_form import choose
from coin.merging.regmean import ALPHAS, DAMPINGS, regmean_parameters
from coin.networks import recalibrate
from coin.statistics import fisher_diagonal, gram_sums

ROW = (0.9, 0.1)
BN_SAMPLES, BN_HELD_OUT = 80, 16  # of both tasks
HELD_OUT = 8


def same(first, second):
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def mixed(tasks):
    """Two equally large tasks' samples in turn."""
    return torch.stack([torch.cat(task) for task in tasks], 1).flatten(0, 1)


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
            recalibrate(network, mixed(calibration).split(8))
    else:
        # Frozen: they were another data set's, and the later layers have learnt to live with them.
        for layer in (second[1], second[4]):
            layer.running_mean.add_(0.01)
    return [first.eval(), second.eval()], calibration


def residual(coded, experts, inputs):
    """How far decoded answers point away from the experts' own, on two tasks' inputs in turn."""
    with torch.no_grad():
        answers, answer = [expert(inputs) for expert in experts], coded(inputs)
    errors = []
    for task in range(2):
        rows = torch.arange(task, len(inputs), 2)
        decoded = (answer[rows] - ROW[1 - task] * answers[1 - task][rows]) / ROW[task]
        for one, two in zip(decoded - decoded.mean(1, keepdim=True), answers[task][rows], strict=True):
            two = two - two.mean()
            errors.append((1 - one @ two / (one.norm() * two.norm()), task))
    return float(sum(sum(e for e, t in errors if t == task) / (len(errors) / 2) for task in range(2)) / 2)


@pytest.mark.parametrize("better", ["average", "recalibrate"])
def test_auto_takes_the_batchnorm_policy_with_the_smaller_held_out_error(better):
    networks, calibration = batchnorm_networks(better)
    experts = Experts(networks, calibration=calibration)
    made = Average().make(experts, ROW)
    samples = mixed(calibration)
    fitted, judged = samples[:-BN_HELD_OUT], samples[-BN_HELD_OUT:]
    fixed, found = {}, {}
    for policy in ("average", "recalibrate"):
        fixed[policy] = Average(batchnorm=policy).make(Experts(networks, calibration=calibration), ROW).network
        trial = deepcopy(fixed[policy])
        if policy == "recalibrate":  # what is judged has not seen the samples that judge it
            recalibrate(trial, fitted.split(8))
        found[policy] = residual(trial, networks, judged)
    other = ({"average", "recalibrate"} - {better}).pop()
    assert found[better] < 0.1 < 0.3 < found[other]
    assert made.chosen == {"batchnorm": better, "held_out_error": pytest.approx(found, rel=1e-10)}
    assert same(made.network, fixed[better])
    assert not same(made.network, fixed[other])
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
        made = Average(label="soup").make(Experts(networks), ROW)
    assert made.chosen == {"batchnorm": "average"}
    assert same(made.network, Average(batchnorm="average").make(Experts(networks), ROW).network)


def test_candidates_and_policies_are_chosen_together():
    networks, calibration = batchnorm_networks("recalibrate")
    made = Coin().make(Experts(networks, calibration=calibration), ROW)
    residuals = made.chosen["held_out_error"]
    assert set(residuals) == {f"{data}/{policy}" for data in ("own", "pooled") for policy in ("average", "recalibrate")}
    assert "/".join(made.chosen[name] for name in ("fisher_data", "batchnorm")) == min(residuals, key=residuals.get)


# The data of statistics


def linear_networks():
    """Two linear experts whose tasks' inputs have little in common."""
    torch.manual_seed(0)
    networks = [nn.Linear(6, 4).double() for _ in range(2)]
    draw = torch.Generator().manual_seed(1)
    scales = torch.tensor([[3, 3, 3, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 3, 3, 3]], dtype=torch.float64)
    return networks, [(scale * torch.randn(20, 6, generator=draw, dtype=torch.float64)).split(8) for scale in scales]


@pytest.mark.parametrize(
    ("method", "option"), [(Coin(damping=0), "fisher_data"), (RegMean(alpha=1, damping=0), "gram_data")]
)
def test_pooled_statistics_of_a_linear_layer_are_exact_and_auto_takes_them(method, option):
    networks, calibration = linear_networks()
    inputs, row, made, errors = mixed(calibration), (0.5, 0.5), {}, {}
    with torch.no_grad():
        target = sum(weight * network(inputs) for weight, network in zip(row, networks, strict=True))
    for data in ("own", "pooled", "auto"):
        setattr(method, option, type(method)(**{option: data}).__dict__[option])
        made[data] = method.make(Experts(networks, calibration=calibration), row)
        assert made[data].chosen[option] == ("pooled" if data == "auto" else data)
        with torch.no_grad():
            errors[data] = float((made[data].network(inputs) - target).norm() / target.norm())
    assert errors["pooled"] < 1e-10
    assert errors["own"] > 0.1
    assert same(made["auto"].network, made["pooled"].network)
    residuals = made["auto"].chosen["held_out_error"]
    assert residuals["pooled"] < 1e-10 < 0.01 < residuals["own"]


def test_one_statistic_that_is_given_is_taken_without_a_look():
    networks, calibration = linear_networks()
    fishers = [fisher_diagonal(*pair) for pair in zip(networks, calibration, strict=True)]
    made = Coin().make(Experts(networks, fishers=fishers), (0.5, 0.5))
    assert made.chosen == {"fisher_data": "own"}
    assert Coin().make(Experts(networks, fishers={"pooled": fishers}), (0.5, 0.5)).chosen == {"fisher_data": "pooled"}
    with pytest.raises(ConfigurationError, match="found fisher statistics of pooled data, expected own"):
        Coin(fisher_data="own").make(Experts(networks, fishers={"pooled": fishers}), (0.5, 0.5))
    with pytest.raises(ConfigurationError, match="no calibration inputs, by which method 'coin' chooses"):
        Coin().make(Experts(networks, fishers={"own": fishers, "pooled": fishers}), (0.5, 0.5))


# RegMean's options


class Mixing(nn.Module):
    """Two fully connected layers and a matrix that no layer owns."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 3)
        self.mix = nn.Parameter(torch.randn(12, 12) / 3)
        self.double()

    def forward(self, x):
        return self.second(torch.einsum("bi,ij->bj", torch.tanh(self.first(x)), self.mix))


def test_regmean_chooses_alpha_and_damping_by_the_held_out_error():
    networks = [Mixing(0), Mixing(1)]
    _, calibration = linear_networks()
    experts = Experts(networks, calibration=calibration)
    made = RegMean(alpha=None, damping=None, gram_data="own").make(experts, ROW)
    samples = mixed(calibration)
    grams = [gram_sums(network, samples[:-HELD_OUT].split(8)).mean() for network in networks]
    states = [{name: parameter.detach() for name, parameter in network.named_parameters()} for network in networks]

    def error(alpha, damping):
        trial = deepcopy(networks[0])
        trial.load_state_dict(regmean_parameters(states, grams, ROW, alpha, damping))
        return residual(trial, networks, samples[-HELD_OUT:])

    errors = {each: error(0.7, each) for each in DAMPINGS}
    best_damping = min(errors, key=errors.get)
    errors = {each: error(each, best_damping) for each in ALPHAS}
    best_alpha = min(errors, key=errors.get)
    assert len({round(each, 9) for each in errors.values()}) == 5
    at_edge = best_damping in (DAMPINGS[0], DAMPINGS[-1])
    chosen = {"alpha": best_alpha, "damping": best_damping, "at_edge": at_edge}
    assert made.chosen == {"gram_data": "own", "averaged": ["mix"]} | chosen
    fixed = RegMean(alpha=best_alpha, damping=best_damping, gram_data="own")
    assert same(made.network, fixed.make(Experts(networks, calibration=calibration), ROW).network)


def test_samples_of_unlike_shapes_merge_and_what_is_no_input_is_told():
    networks = [nn.Sequential(nn.EmbeddingBag(9, 6), nn.Linear(6, 3)) for _ in range(2)]
    draw = torch.Generator().manual_seed(0)
    ragged = [[torch.randint(9, (10, length), generator=draw) for length in (4, 7)] for _ in range(2)]
    experts = Experts(networks, calibration=ragged)
    assert [tuple(batch.shape) for batch in experts.pooled] == [(10, 4), (10, 4), (10, 7), (10, 7)]
    assert experts.tasks.tolist() == [0, 1] * 20
    assert Average().make(experts, ROW).network(ragged[0][1]).shape == (10, 3)
    labelled = [[(batch, torch.zeros(10)) for batch in batches] for batches in ragged]
    for given, expected in zip(Experts(networks, calibration=labelled).pooled, experts.pooled, strict=True):
        assert torch.equal(given, expected)
    assert set(Experts([*networks, networks[0]], calibration=[*ragged, []]).tasks.tolist()) == {0, 1}
    with pytest.raises(DataError, match="found no calibration batches, expected at least one"):
        Experts(networks, calibration=[[], []])
    with pytest.raises(DataError, match=r"found a tensor for a task's calibration, expected its batches; write \[ten"):
        Experts(networks, calibration=[ragged[0][0], ragged[1][0]])


def test_few_samples_to_choose_by_are_told_of():
    networks, calibration = linear_networks()
    few = [[torch.cat(task)[:20]] for task in calibration]
    for method in (Coin(), RegMean(alpha=None)):
        message = f"method '{method.name}' chose by 8 held-out calibration samples, expected at least 10"
        with pytest.warns(CoinWarning, match=message):
            method.make(Experts(networks, calibration=few), ROW)


def test_the_first_of_the_best_is_chosen_one_alone_untried_and_none_that_is_not_finite():
    networks, calibration = batchnorm_networks("average")
    experts, broken = Experts(networks, calibration=calibration), deepcopy(networks[0])
    broken[-1].bias.data[0] = torch.nan
    options = [broken, networks[1], networks[0], networks[1]]
    best, errors = choose(options, lambda network: network, experts, (0.0, 1.0), "mine")
    assert best is networks[1]
    assert errors[0] == float("inf")
    assert errors[1] == errors[3] <= errors[2] < 1
    assert choose([broken], None, experts, ROW, "mine") == (broken, [])
    with pytest.raises(NumericalError, match="the outputs of method 'mine' on held-out calibration samples are not"):
        choose([broken] * 2, lambda network: network, experts, ROW, "mine")
