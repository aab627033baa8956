"""The methods of `notebooks/foreign_methods.py` are their formulas."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import coin
from coin.merging import Average, Experts, UserMethod
from notebooks.foreign_methods import Ace, IsoC, Magic, TaskArithmetic, Ties, TsvM, Wudi, dare, distil

ROW = [0.25, 0.75]


def setup():
    """A convolution, one of several groups, and a head, and two experts a little way from them."""
    torch.manual_seed(0)
    initial = nn.Sequential(nn.Conv2d(3, 6, 2), nn.Conv2d(6, 6, 1, groups=6), nn.Flatten(), nn.Linear(6, 4)).double()
    networks = [deepcopy(initial) for _ in ROW]
    for network in networks:
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    calibration = [[torch.randn(4, 3, 2, 2).double()] for _ in ROW]
    return initial, networks, Experts(networks, initial=initial, calibration=calibration)


def steps_of(networks, initial):
    return [(network[0].weight - initial[0].weight).detach().flatten(1) for network in networks]


@pytest.mark.parametrize("method", [Wudi, IsoC, TsvM, Magic, Ace])
def test_one_that_merges_matrices_averages_the_rest(method):
    _, _, experts = setup()
    made = method().coded_model(experts, ROW).network
    averaged = Average().make(experts, ROW).network
    for name, tensor in averaged.named_parameters():  # vectors, depthwise kernels and the head
        found = made.get_parameter(name)
        if name == "0.weight":
            assert (found - tensor).norm() > 0.01 * tensor.norm()
        else:
            torch.testing.assert_close(found, tensor)


@pytest.mark.parametrize("method", [Wudi(), TaskArithmetic(), Ties(keep=1.0), IsoC(), TsvM(), Magic(), Ace()])
def test_experts_that_are_the_base_merge_to_it(method):
    initial, _, _ = setup()
    experts = Experts([deepcopy(initial) for _ in ROW], initial=initial)
    made = method.coded_model(experts, ROW).network
    for name, tensor in initial.named_parameters():
        torch.testing.assert_close(made.get_parameter(name), tensor)


def test_task_arithmetic_by_hand():
    initial, networks, experts = setup()
    made = TaskArithmetic(0.4).make(experts, [0.5, 0.5]).network
    first, second = steps_of(networks, initial)
    torch.testing.assert_close(steps_of([made], initial)[0], 0.4 * (first + second))
    averaged = TaskArithmetic(0.5).make(experts, ROW).network
    torch.testing.assert_close(averaged[3].weight, Average().make(experts, ROW).network[3].weight)


def test_ties_by_hand():
    def linear(*values):
        layer = nn.Linear(2, 2, bias=False).double()
        layer.weight.data = torch.tensor(values).double().reshape(2, 2)
        return layer

    networks = [linear(1, 6, 6, 1.2), linear(1, 4, -1, 7), linear(1, -1, -2, 1)]
    experts = Experts(networks, initial=linear(1, 1, 1, 1))
    # Task vectors (0, 5, 5, .2), (0, 3, −2, 6), (0, −2, −3, 0); half of four entries stay:
    # (0, 5, 5, 0), (0, 3, 0, 6), (0, −2, −3, 0), elected signs 0, +, +, +.
    made = Ties(keep=0.5, scale=2).make(experts, [1 / 3] * 3).network
    assert made.weight.flatten().tolist() == pytest.approx([1, 1 + 2 * 4, 1 + 2 * 5, 1 + 2 * 6])
    # Now 0.2·5 + 0.1·3 − 0.7·2 < 0 elects − for the second entry, and 0.2·5 − 0.7·3 < 0 for the third.
    made = Ties(keep=0.5).make(experts, (0.2, 0.1, 0.7)).network
    assert made.weight.flatten().tolist() == pytest.approx([1, 1 - 2, 1 - 3, 1 + 6])


def test_wudi_minimises_the_interference_of_the_task_vectors():
    initial, networks, experts = setup()
    (found,) = steps_of([Wudi(damping=1e-4).make(experts, ROW).network], initial)
    steps = steps_of(networks, initial)
    average = sum(share * step for share, step in zip(ROW, steps, strict=True))
    # Σ_i β_i ‖(W − W_i) τ_iᵀ‖² / ‖τ_i‖² + λ ‖W − W̄‖² as one least-squares problem, a row of W an unknown vector.
    rows = [(share**0.5 / step.norm()) * step for share, step in zip(ROW, steps, strict=True)]
    width = steps[0].shape[1]
    damping = (1e-4 * sum(float(each.square().sum()) for each in rows) / width) ** 0.5
    left = torch.cat([*rows, damping * torch.eye(width).double()])
    right = [each @ step.T for each, step in zip(rows, steps, strict=True)]
    expected = torch.linalg.lstsq(left, torch.cat([*right, damping * average.T])).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_the_singular_vectors_are_those_of_the_formulas():
    initial, networks, experts = setup()
    steps = steps_of(networks, initial)
    made = [method.make(experts, [0.5, 0.5]).network for method in (IsoC(), TsvM())]
    iso_c, tsv_m = steps_of(made, initial)
    whole = torch.linalg.svdvals(sum(steps))
    torch.testing.assert_close(torch.linalg.svdvals(iso_c), whole.mean().expand(6))
    products = torch.linalg.svdvals(iso_c.T @ sum(steps))  # of the same singular vectors
    torch.testing.assert_close(products[:6], whole * whole.mean())
    kept = torch.cat([torch.linalg.svdvals(step)[:3] for step in steps])  # 6 // 2 of each
    torch.testing.assert_close(torch.linalg.svdvals(tsv_m), kept.sort(descending=True).values)


def test_functions_of_networks():
    initial, networks, experts = setup()
    plain = UserMethod(dare, {"drop": 0.0}).make(experts, ROW).network
    for name, tensor in Average().make(experts, ROW).network.named_parameters():
        torch.testing.assert_close(plain.get_parameter(name), tensor)
    dropped = UserMethod(dare, {"drop": 0.9}).make(experts, ROW).network
    assert (dropped[0].weight == initial[0].weight).float().mean() > 0.5

    mixture = coin.uniform(2)
    inputs = torch.randn(40, 3, 2, 2).double()
    calibration = [[inputs[:20]], [inputs[20:]]]

    def distance(network):
        wanted = sum(0.5 * each(inputs) for each in networks)
        return float((network(inputs) - wanted).norm())

    made = []
    for steps in (0, 100):
        method = UserMethod(distil, {"steps": steps, "lr": 1e-2})
        made += coin.merge_networks(method, networks, mixture, calibration=calibration)
    with torch.no_grad():
        assert distance(made[1]) < 0.5 * distance(made[0])
