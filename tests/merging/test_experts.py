"""Experts of unequal class counts, and networks that are called with batches of anything made of tensors."""

from copy import deepcopy
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from closeness import close
from torch import nn

from coin.coding import Code
from coin.errors import ConfigurationError, DataError, HeadError, StateError
from coin.merging import Average, Base, Coin, Experts, HeadFit, Refit, RegMean, merge_networks
from coin.merging.expert_sources import ExpertFiles
from coin.merging.expert_statistics import statistics_of
from coin.modules import Coded
from coin.networks import recalibrate
from coin.statistics import fisher_diagonal, gram_sums

CODE = Code([[0.4, 0.6]])
by_label = attrgetter("label")


def equal(first, second):
    return all(torch.equal(second[name], tensor) for name, tensor in first.items()) and first.keys() == second.keys()


# Class counts

METHODS = [Average(), Coin(), RegMean(), HeadFit(), Base(), Refit()]
DRAW = torch.Generator().manual_seed(5)
CALIBRATION = [[torch.randn(12, 6, generator=DRAW, dtype=torch.float64)] for _ in range(2)]


def make(seed, classes, last=None):
    torch.manual_seed(seed)
    body = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, classes)]
    return nn.Sequential(*body, *([last] if last is not None else [])).double()


def padded(network, classes):
    """The same network with a head of more rows, all zero."""
    wide = deepcopy(network)
    for name in ("weight", "bias"):
        own = getattr(wide[2], name)
        zeros = own.new_zeros(classes - len(own), *own.shape[1:])
        setattr(wide[2], name, nn.Parameter(torch.cat([own, zeros])))
    return wide


@pytest.mark.parametrize("method", METHODS, ids=by_label)
def test_heads_are_padded_with_zeros_to_the_largest_count(method):
    counts = (2, 4)
    experts, initial = [make(seed, classes) for seed, classes in enumerate(counts)], make(7, 3)
    before = deepcopy([expert.state_dict() for expert in experts])
    (found,) = merge_networks(method, experts, CODE, calibration=CALIBRATION, initial=initial)
    wide = [padded(expert, 4) for expert in experts]
    (expected,) = merge_networks(method, wide, CODE, calibration=CALIBRATION, initial=padded(initial, 4))
    wanted = expected.state_dict()
    for name, tensor in found.state_dict().items():  # of heads of two rows, and of four
        assert close(tensor, wanted[name], sums=CALIBRATION[0][0].numel()), name
    assert found[2].out_features == 4
    assert all(equal(state, expert.state_dict()) for state, expert in zip(before, experts, strict=True))
    assert [expert[2].out_features for expert in experts] == list(counts)


@pytest.mark.parametrize("kind", ["exact", "categorical"])
def test_fishers_are_of_the_experts_and_not_of_padded_ones(kind):
    """With 10 and 100 classes the categorical Fisher of the body had 0.138 of its own mass: padding took the rest."""
    experts = [make(1, 10), make(2, 100)]
    own = [fisher_diagonal(*each, kind=kind) for each in zip(experts, CALIBRATION, strict=True)]
    (which,) = Coin(fisher_kind=kind).statistics()
    found = statistics_of(Experts(experts, calibration=CALIBRATION), which)
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
        (Coin(fisher_kind=kind, fisher_data="own"), {"fishers": fishers}),
        (RegMean(gram_data="own"), {"grams": grams}),
    ):
        (found,) = merge_networks(method, experts, CODE, calibration=CALIBRATION, **given)
        expected = merge_networks(method, experts, CODE, calibration=CALIBRATION)[0].state_dict()
        for name, tensor in found.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)
        # A probability of a class that is none of the task's is no evidence: its rows are the other expert's alone.
        if kind == "categorical" and "fishers" in given:
            torch.testing.assert_close(found[2].weight[2:], experts[0][2].weight[2:], rtol=1e-2, atol=1e-3)


def test_a_network_that_is_its_head_is_padded():
    layers = [nn.Linear(6, 2), nn.Linear(6, 3)]
    (coded,) = merge_networks(Average(), layers, CODE)
    torch.testing.assert_close(coded.weight[2], 0.6 * layers[1].weight[2])


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
        (Tied, r"'expert 1' has a tensor 'head\.weight' too many"),
        (Early, r"'expert 1' has tensor 'classes\.weight' of shape \[2, 6\], expected \[3, 6\]"),
        (lambda classes: nn.Sequential(nn.Bilinear(3, 3, classes)), "found no Linear layer in Sequential"),
    ):
        with pytest.raises(StateError, match=message):
            Experts([kind(3), kind(2)])
    rectified = nn.Sequential(make(2, 3)[0], nn.ReLU(), make(2, 3)[2])
    others = {"0.weight' of torch": make(2, 3).float(), "network' of ": Early(3).double(), "1' of Tanh and": rectified}
    for message, other in others.items():
        with pytest.raises(ConfigurationError, match=f"experts with '{message}.*, expected one class and type"):
            Experts([make(1, 3), other, make(4, 3)])
    Experts([make(1, 3, each) for each in (nn.Dropout(), nn.Identity())])
    with pytest.raises(StateError, match=r"'expert 1' has no tensor '2\.bias'"):
        merge_networks(Average(), [make(1, 3), nn.Sequential(nn.Linear(6, 8)).double()], CODE)
    merge_networks(Average(), [nn.Bilinear(3, 3, 2) for _ in "ab"], CODE)  # reads no head
    softmax = [make(1, 3, nn.LogSoftmax(1)), make(2, 2, nn.LogSoftmax(1))]
    with pytest.raises(HeadError, match="the logits of Sequential are not its head '2' of its input"):
        Experts(softmax, calibration=CALIBRATION)


# Batches by name


class Texts(nn.Module):
    """A small network that is called as Hugging Face's are."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        words = self.words(input_ids) * attention_mask[..., None]
        hidden = self.norm(torch.tanh(self.inner(words.sum(1) / attention_mask.sum(1, keepdim=True))))
        return SimpleNamespace(logits=self.classifier(hidden))


class Stacked(Texts):
    """The same network of one tensor: tokens and mask ``[B, 2, T]``."""

    def forward(self, inputs):
        return super().forward(*inputs.unbind(1)).logits


def call(network, batch):
    return network(**batch).logits


def named(batch):
    return dict(zip(("input_ids", "attention_mask"), batch.unbind(1), strict=True))


def stacked_batches(seed):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (14, 5), generator=draw)
    lengths = torch.randint(1, 6, (14, 1), generator=draw)
    whole = torch.stack([tokens, (torch.arange(5) < lengths).long()], 1)
    return list(whole.split(5))


def networks(kind):
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(kind().double().eval())
        made[-1].norm.running_mean += 0.1 * seed
    return made


STACKED = [stacked_batches(seed) for seed in (5, 6)]
NAMED = [[named(batch) for batch in batches] for batches in STACKED]


@pytest.mark.parametrize(
    "method",
    [Average(batchnorm="recalibrate"), Coin(), RegMean(), HeadFit(), Refit()],
    ids=by_label,
)
def test_batches_by_name_merge_as_one_tensor_does(method):
    (expected,) = merge_networks(method, networks(Stacked), CODE, calibration=STACKED)
    (found,) = merge_networks(method, networks(Texts), CODE, calibration=NAMED)
    assert equal(expected.state_dict(), found.state_dict())
    assert type(found) is Texts
    assert vars(found).keys() == vars(Texts()).keys()
    assert torch.equal(call(found, NAMED[0][0]), expected(STACKED[0][0]))


def test_statistics_and_recalibration_read_batches_by_name():
    plain, own = networks(Stacked)[0], networks(Texts)[0]
    for statistic in (
        fisher_diagonal,
        lambda *given, **options: fisher_diagonal(*given, memory_mib=1, **options),
        lambda *given, **options: fisher_diagonal(*given, kind="categorical", **options),
        lambda *given, **options: gram_sums(*given, **options).mean(),
    ):
        assert equal(statistic(plain, STACKED[0]), statistic(own, NAMED[0]))
    assert recalibrate(plain, STACKED[0]) == recalibrate(own, NAMED[0]) == 14
    assert torch.equal(plain.norm.running_var, own.norm.running_var)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"a": torch.zeros(2, 3), "text": ["a", "b"]}, "found a batch of type dict, expected a tensor"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(3)}, "or tensors by name of as many samples"),
        ((torch.zeros(2, 3),) * 3, "found a batch of type tuple, expected a tensor .*, or ten"),
    ],
)
def test_batches_of_anything_else_are_told(batch, message):
    network = networks(Texts)[0]
    for use in (
        lambda: fisher_diagonal(network, [batch]),
        lambda: gram_sums(network, [batch]),
        lambda: recalibrate(network, [batch]),
        lambda: Experts([network] * 2, calibration=[[batch]] * 2),
        lambda: Coded(Code([[1.0]]), [network], [network]).answers(batch),
    ):
        with pytest.raises(DataError, match=message) as told:
            use()
        assert "\n" not in str(told.value)


def test_a_shared_initialisation_of_more_classes_than_the_experts_is_refused(write_experts):
    experts = [make(seed, classes) for seed, classes in enumerate((2, 4))]
    with pytest.raises(ConfigurationError, match="initialisation of 5 classes for experts of up to 4"):
        merge_networks(Base(), experts, CODE, initial=make(7, 5))
    paths = write_experts([3, 2, 5])
    *own, wide = map(Path, paths.values())
    with pytest.raises(ConfigurationError, match="initialisation of 5 classes for experts of up to 3"):
        ExpertFiles(dict(enumerate(own)), wide)
