"""The methods of `notebooks/foreign_methods.py` are their formulas."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from coin.merging import Average, Experts, UserMethod
from notebooks.foreign_methods import Ace, IsoC, Magic, TaskArithmetic, Ties, TsvM, Wudi, dare

ROW = [0.25, 0.75]


def network():
    """A convolution, one of several groups, and a head."""
    layers = (
        nn.Conv2d(3, 6, 2),
        nn.Conv2d(6, 6, 1, groups=6),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    return nn.Sequential(*layers).double()


@pytest.fixture
def parts():
    """Return a network, two experts a little way from it, and these with it and samples."""
    torch.manual_seed(0)
    initial = network()
    networks = [deepcopy(initial) for _ in ROW]
    for each in networks:
        for parameter in each.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    calibration = [[torch.randn(4, 3, 2, 2).double()] for _ in ROW]
    return initial, networks, Experts(networks, initial=initial, calibration=calibration)


def step_of(network, initial):
    """Return the task vector of the convolution, a matrix."""
    step = network[0].weight - initial[0].weight
    return step.detach().flatten(1)


@pytest.mark.parametrize("method", [Wudi, IsoC, TsvM, Magic, Ace])
def test_one_that_merges_matrices_averages_the_rest(method, parts):
    _, _, experts = parts
    made = method().coded_model(experts, ROW).network
    averaged = Average().make(experts, ROW).network
    for name, tensor in averaged.named_parameters():  # vectors, depthwise kernels and the head
        is_average = torch.allclose(made.get_parameter(name), tensor, rtol=1e-6, atol=1e-8)
        assert is_average == (name != "0.weight"), name


def test_task_arithmetic_by_hand(parts):
    initial, networks, experts = parts
    made = TaskArithmetic(0.4).make(experts, [0.5, 0.5]).network
    total = step_of(networks[0], initial) + step_of(networks[1], initial)
    assert_close(step_of(made, initial), 0.4 * total)
    averaged = Average().make(experts, ROW).network
    assert_close(TaskArithmetic(0.5).make(experts, ROW).network[3].weight, averaged[3].weight)


def linear(*values):
    layer = nn.Linear(2, 2, bias=False).double()
    layer.weight.data = torch.tensor(values).double().reshape(2, 2)
    return layer


@pytest.mark.parametrize(
    ("scale", "row", "steps"),
    [
        # Of (0, 5, 5, 0), (0, 3, 0, 6), (0, −2, −3, 0), the larger halves, the elected signs are 0, +, +, +.
        (2, [1 / 3] * 3, [0, 2 * 4, 2 * 5, 2 * 6]),
        # 0.2·5 + 0.1·3 − 0.7·2 < 0 elects − for the second entry, and 0.2·5 − 0.7·3 < 0 for the third.
        (1, [0.2, 0.1, 0.7], [0, -2, -3, 6]),
    ],
)
def test_ties_by_hand(scale, row, steps):
    # Task vectors (0, 5, 5, .2), (0, 3, −2, 6), (0, −2, −3, 0).
    networks = [
        linear(1, 6, 6, 1.2),
        linear(1, 4, -1, 7),
        linear(1, -1, -2, 1),
    ]
    experts = Experts(networks, initial=linear(1, 1, 1, 1))
    made = Ties(keep=0.5, scale=scale).make(experts, row).network
    found = made.weight.flatten() - 1
    assert found.tolist() == pytest.approx(steps)


def test_wudi_minimises_the_interference_of_the_task_vectors(parts):
    initial, networks, experts = parts
    found = step_of(Wudi(damping=1e-4).make(experts, ROW).network, initial)
    # Σ_i β_i ‖(W − W_i) τ_iᵀ‖² / ‖τ_i‖² + λ ‖W − W̄‖² as one least-squares problem, a row of W an unknown vector.
    rows = []
    targets = []
    average = 0
    for share, each in zip(ROW, networks, strict=True):
        step = step_of(each, initial)
        row = share**0.5 / step.norm() * step
        rows.append(row)
        targets.append(row @ step.T)
        average = average + share * step
    squares = torch.cat(rows).square().sum()
    damping = (1e-4 * squares / average.shape[1]).sqrt()
    rows.append(damping * torch.eye(average.shape[1]).double())
    targets.append(damping * average.T)
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.T
    assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_the_singular_vectors_are_those_of_the_formulas(parts):
    initial, networks, experts = parts
    steps = [step_of(each, initial) for each in networks]
    iso_c = step_of(IsoC().make(experts, [0.5, 0.5]).network, initial)
    tsv_m = step_of(TsvM().make(experts, [0.5, 0.5]).network, initial)
    whole = torch.linalg.svdvals(sum(steps))
    assert_close(torch.linalg.svdvals(iso_c), whole.mean().expand(6))
    products = torch.linalg.svdvals(iso_c.T @ sum(steps))  # of the same singular vectors
    assert_close(products[:6], whole * whole.mean())
    kept = torch.cat([torch.linalg.svdvals(step)[:3] for step in steps])  # 6 // 2 of each
    assert_close(torch.linalg.svdvals(tsv_m), kept.sort(descending=True).values)


def test_dare_drops_entries_and_without_is_the_average(parts):
    initial, _, experts = parts
    plain = UserMethod(dare, {"drop": 0.0}).make(experts, ROW).network
    averaged = Average().make(experts, ROW).network
    for name, tensor in averaged.named_parameters():
        assert_close(plain.get_parameter(name), tensor)
    dropped = UserMethod(dare, {"drop": 0.9}).make(experts, ROW).network
    is_initial = dropped[0].weight == initial[0].weight
    assert is_initial.float().mean() > 0.5
