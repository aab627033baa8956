"""BatchNorm's statistics by a policy, and the choice of one on held-out samples."""

import warnings
from copy import deepcopy

import pytest
import torch
from near_experts import answers, assert_same_tensors, mixture
from torch import nn
from torch.testing import assert_close

import coin
from coin.errors import CoinWarning, ConfigurationError, NumericalError
from coin.merging import Average, Base, Experts
from coin.networks import recalibrate

PAIR = (0.9, 0.1)
SAMPLES = 80  # of both tasks
HELD_OUT = 16


@pytest.fixture
def calibration():
    draw = torch.Generator().manual_seed(0)
    tasks = []
    for _ in range(2):
        images = torch.randn(40, 2, 6, 6, generator=draw, dtype=torch.float64)
        tasks.append((3 + 4 * images).split(8))
    return tasks


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).double()


def frozen_statistics(calibration):
    """Experts whose statistics were another data set's, with which the later layers have learnt to live."""
    first = convolutions().eval()
    second = deepcopy(first)
    for norm in (second[1], second[4]):
        norm.running_mean.add_(0.01)
    return [first, second]


def trained_statistics(calibration):
    """Experts of one function, the second's convolutions 50 times larger, which its statistics take back.

    The average of the variances is not the variance of the average.
    """
    first = convolutions()
    second = deepcopy(first)
    for layer in (second[0], second[3]):
        layer.weight.data.mul_(50)
        layer.bias.data.mul_(50)
    pooled = Experts([first, second], calibration=calibration).pooled
    for network in (first, second):
        recalibrate(network, pooled)
    return [first.eval(), second.eval()]


def residual(coded, networks, inputs):
    """Return ‖f_c − Σβ_i f_i‖ / ‖Σβ_i f_i‖ for the row `PAIR`."""
    wanted = mixture(networks, PAIR, inputs)
    return float((answers(coded, inputs) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("make", "better", "worse"),
    [(frozen_statistics, "average", "recalibrate"), (trained_statistics, "recalibrate", "average")],
)
def test_auto_takes_the_policy_with_the_smaller_held_out_residual(make, better, worse, calibration):
    networks = make(calibration)
    experts = Experts(networks, calibration=calibration)
    made = Average().make(experts, PAIR)
    fitted, held_out = experts.split
    fixed = {}
    residuals = {}
    for policy in ("average", "recalibrate"):
        method = Average(batchnorm=policy)
        fixed[policy] = method.make(Experts(networks, calibration=calibration), PAIR).network
        trial = deepcopy(fixed[policy])
        if policy == "recalibrate":  # what is judged has not seen the samples that judge it
            recalibrate(trial, fitted)
        residuals[policy] = residual(trial, networks, torch.cat(list(held_out)))
    assert residuals[better] < 0.1 < 0.3 < residuals[worse]
    found = pytest.approx(residuals, rel=1e-10)
    assert made.chosen == {"batchnorm": better, "held_out_residual": found}
    assert_same_tensors(made.network, fixed[better])
    # The experts and both candidates on the held-out samples; the statistics on the others, and at last on all.
    last = SAMPLES if better == "recalibrate" else 0
    passes = 4 * HELD_OUT + (SAMPLES - HELD_OUT) + last
    assert experts.passes == passes
    Average().make(experts, (0.5, 0.5))
    assert experts.passes == 2 * passes - 2 * HELD_OUT  # the experts are run once for all rows


def test_statistics_that_all_experts_share_stay_to_the_last_bit(calibration):
    networks = [convolutions().eval() for _ in range(3)]
    for network in networks:
        network[1].running_mean.fill_(0.1)
    experts = Experts(networks, calibration=[*calibration, calibration[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = Average().make(experts, (0.1, 0.2, 0.7))
    assert made.chosen == {"batchnorm": "same"}
    assert experts.passes == 0
    assert torch.equal(made.network[1].running_mean, networks[0][1].running_mean)


def test_without_calibration_data_auto_averages_with_a_warning(calibration):
    networks = trained_statistics(calibration)
    message = r"^found no calibration inputs, needed by method 'soup' [^\n]*average"
    with pytest.warns(CoinWarning, match=message):
        made = Average(label="soup").make(Experts(networks), PAIR)
    assert made.chosen == {"batchnorm": "average"}
    averaged = Average(batchnorm="average").make(Experts(networks), PAIR)
    assert_same_tensors(made.network, averaged.network)


def test_too_few_samples_to_hold_one_out_are_refused(calibration):
    networks = frozen_statistics(calibration)
    few = [[batches[0][:1]] for batches in calibration]
    with pytest.raises(
        ConfigurationError, match="found 2 calibration samples in all, expected at least 3"
    ):
        Average().make(Experts(networks, calibration=few), PAIR)


class Enlarged(Average):
    """The average with convolutions so much larger that without new statistics the squares of outputs overflow."""

    name = "enlarged"
    bias = 0.0

    def parameters(self, experts, row):
        made = dict(super().parameters(experts, row))
        for name in ("0.weight", "3.weight"):
            made[name] = made[name] * 1e120
        made["8.bias"] = torch.full((3,), self.bias).double()
        return made


def test_a_policy_whose_outputs_are_not_finite_is_not_taken(calibration):
    experts = Experts(frozen_statistics(calibration), calibration=calibration)
    method = Enlarged()
    assert method.make(experts, PAIR).chosen["batchnorm"] == "recalibrate"
    method.bias = torch.inf
    with pytest.raises(
        NumericalError, match="outputs of method 'enlarged' on held-out calibration samples"
    ):
        method.make(experts, PAIR)


@pytest.mark.parametrize(
    ("policy", "mean"), [("keep", 0.0), ("average", 0.2 * 1 + 0.3 * 2 + 0.5 * 3)]
)
def test_statistics_are_averaged_or_those_of_the_initialisation(policy, mean):
    networks = []
    for index in range(4):
        network = convolutions()
        network[1].running_mean.fill_(index)
        networks.append(network)
    initial, *experts = networks
    for kind in (Average, Base):
        method = kind(batchnorm=policy)
        (made,) = coin.merge_networks(method, experts, [(0.2, 0.3, 0.5)], initial=initial)
        assert_close(made[1].running_mean, torch.full((6,), mean).double())
        assert torch.equal(made[0].weight, initial[0].weight)
