"""Experts of unequal class counts in memory."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from coin.coding import Code
from coin.errors import HeadError, StateError
from coin.merging import Average, Base, Coin, Experts, HeadFit, Refit, RegMean, TaskArithmetic, Wudi, merge_networks
from coin.statistics import fisher_diagonal, gram_sums

CODE = Code([[0.4, 0.6]])
METHODS = [Average(), Coin(), RegMean(), HeadFit(), TaskArithmetic(), Wudi(), Base(), Refit(start="wudi")]


def make(seed, classes, last=None):
    torch.manual_seed(seed)
    body = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, classes)]
    return nn.Sequential(*body, *([last] if last is not None else [])).double()


def padded(network, classes):
    """The same network with a head of more rows, all zero."""
    wide = deepcopy(network)
    head = nn.Linear(8, classes).double()
    with torch.no_grad():
        for own, old in ((head.weight, network[2].weight), (head.bias, network[2].bias)):
            own.zero_()
            own[: len(old)] = old
    wide[2] = head
    return wide


CALIBRATION = [
    [torch.randn(12, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)] for seed in (5, 6)
]


def equal(first, second):
    return all(torch.equal(second[name], tensor) for name, tensor in first.items()) and first.keys() == second.keys()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_heads_are_padded_with_zeros_to_the_largest_count(method):
    counts = (2, 4)
    experts, initial = [make(seed, classes) for seed, classes in enumerate(counts)], make(7, 3)
    before = deepcopy([expert.state_dict() for expert in experts])
    (found,) = merge_networks(method, experts, CODE, calibration=CALIBRATION, initial=initial)
    wide = [padded(expert, 4) for expert in experts]
    (expected,) = merge_networks(method, wide, CODE, calibration=CALIBRATION, initial=padded(initial, 4))
    assert equal(expected.state_dict(), found.state_dict())
    assert found[2].out_features == 4
    assert all(equal(state, expert.state_dict()) for state, expert in zip(before, experts, strict=True))
    assert [expert[2].out_features for expert in experts] == list(counts)


@pytest.mark.parametrize("kind", ["exact", "categorical"])
def test_fishers_are_of_the_experts_and_not_of_padded_ones(kind):
    """With 10 and 100 classes the categorical Fisher of the body had 0.138 of its own mass: padding took the rest."""
    experts = [make(1, 10), make(2, 100)]
    own = [fisher_diagonal(*each, kind=kind) for each in zip(experts, CALIBRATION, strict=True)]
    found = Experts(experts, calibration=CALIBRATION).statistic(Coin(fisher_kind=kind).fisher("own"))
    for theirs, wanted in zip(found, own, strict=True):
        assert theirs["2.weight"].shape == (100, 8)
        for name in ("0.weight", "0.bias"):
            assert torch.equal(theirs[name], wanted[name])
    if kind == "categorical":
        wide = fisher_diagonal(padded(experts[0], 100), CALIBRATION[0], kind=kind)
        assert wide["0.weight"].sum() < 0.5 * own[0]["0.weight"].sum()


@pytest.mark.parametrize("kind", ["exact", "categorical"])
def test_given_statistics_are_padded_like_those_that_are_computed(kind):
    experts = [make(1, 4), make(2, 2)]
    fishers = [fisher_diagonal(*each, kind=kind) for each in zip(experts, CALIBRATION, strict=True)]
    grams = [gram_sums(*each).mean() for each in zip(experts, CALIBRATION, strict=True)]
    for method, given in (
        (Coin(fisher_kind=kind, fisher_data="own"), {"fishers": {"own": fishers}}),
        (RegMean(gram_data="own"), {"grams": grams}),
    ):
        (found,) = merge_networks(method, experts, CODE, calibration=CALIBRATION, **given)
        expected = merge_networks(method, experts, CODE, calibration=CALIBRATION)[0].state_dict()
        for name, tensor in found.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)
        # A probability of a class that is none of the task's is no evidence: its rows are the other expert's alone.
        if kind == "categorical" and "fishers" in given:
            torch.testing.assert_close(found[2].weight[2:], experts[0][2].weight[2:], rtol=1e-2, atol=1e-3)


def test_a_network_that_is_its_head_and_a_convolution_are_padded():
    layers = [nn.Linear(6, 2), nn.Linear(6, 3)]
    (coded,) = merge_networks(Average(), layers, CODE)
    torch.testing.assert_close(coded.weight[2], 0.6 * layers[1].weight[2])
    (coded,) = merge_networks(Average(), [nn.Sequential(nn.Conv2d(2, n, 1), nn.Flatten(2)) for n in (5, 3)], CODE)
    assert coded(torch.randn(4, 2, 3, 3)).shape == (4, 5, 9)


def test_heads_that_cannot_be_padded_are_told_in_one_line():
    class Tied(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.words, self.head = nn.Embedding(classes, 8), nn.Linear(8, classes, bias=False)
            self.head.weight = self.words.weight

    class Early(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.classes, self.inner = nn.Linear(6, classes), nn.Linear(6, 6)

    for kind, message in (
        (Tied, r"'words\.weight' is \[2, 8\] in one expert but \[3, 8\] in another, and their head is 'head'; name"),
        (Early, r"'classes\.bias' is \[2\] in one expert but \[3\] in another, and their head is 'inner'; name"),
        (lambda classes: nn.Sequential(nn.Bilinear(3, 3, classes)), "found no Linear or Conv2d layer in Sequential"),
    ):
        with pytest.raises(HeadError, match=message):
            Experts([kind(3), kind(2)])
    with pytest.raises(StateError, match=r"expert 1 has no tensor '2\.bias'"):
        merge_networks(Average(), [make(1, 3), nn.Sequential(nn.Linear(6, 8))], CODE)
    softmax = [make(1, 3, nn.LogSoftmax(1)), make(2, 2, nn.LogSoftmax(1))]
    with pytest.raises(
        HeadError, match="the logits of Sequential are not those of its head '2', which is padded since"
    ):
        Experts(softmax, calibration=CALIBRATION)
