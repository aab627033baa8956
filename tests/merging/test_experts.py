"""Experts of unequal class counts, in memory and in files, and batches of anything made of tensors."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from closeness import close
from near_experts import ROW, assert_same_tensors, near_experts
from torch import nn
from torch.testing import assert_close

from coin.errors import ConfigurationError, DataError, HeadError, StateError
from coin.merging import Average, Base, Coin, Experts, HeadFit, Refit, RegMean, merge_networks
from coin.merging.expert_sources import FAR, ExpertFiles, spread
from coin.merging.expert_statistics import statistics_of
from coin.networks import load_network
from coin.statistics import fisher_diagonal, fisher_sums, save_statistic

CODE = [(0.4, 0.6)]


def labels(method):
    return method.label


# Class counts


def perceptron(seed, classes, *after):
    torch.manual_seed(seed)
    layers = (
        nn.Linear(6, 8),
        nn.Tanh(),
        nn.Linear(8, classes),
        *after,
    )
    return nn.Sequential(*layers).double()


def padded(network, classes):
    """The same network with a head of more rows, all zero."""
    wide = deepcopy(network)
    for name, own in network[2].named_parameters():
        rows = own.new_zeros(classes, *own.shape[1:])
        rows[: len(own)] = own.detach()
        setattr(wide[2], name, nn.Parameter(rows))
    return wide


@pytest.fixture
def calibration():
    draw = torch.Generator().manual_seed(5)
    return [[torch.randn(12, 6, generator=draw, dtype=torch.float64)] for _ in range(2)]


@pytest.mark.parametrize(
    "method",
    [Average(), Coin(), RegMean(), HeadFit(), Base(), Refit()],
    ids=labels,
)
def test_heads_are_padded_with_zeros_to_the_largest_count(method, calibration):
    experts = [perceptron(0, 2), perceptron(1, 4)]
    initial = perceptron(7, 3)
    before = deepcopy(experts[0])
    (found,) = merge_networks(method, experts, CODE, calibration=calibration, initial=initial)
    wide = [padded(expert, 4) for expert in experts]
    start = padded(initial, 4)
    (expected,) = merge_networks(method, wide, CODE, calibration=calibration, initial=start)
    for name, tensor in expected.state_dict().items():  # of heads of two rows, and of four
        assert close(found.state_dict()[name], tensor, sums=72), name
    assert found[2].out_features == 4
    assert experts[0][2].out_features == 2
    assert_same_tensors(experts[0], before)


@pytest.mark.parametrize("kind", ["exact", "categorical"])
@pytest.mark.parametrize("is_given", [False, True])
def test_fishers_are_of_the_experts_and_not_of_padded_ones(kind, is_given, calibration):
    """With 10 and 100 classes the categorical Fisher of the body had 0.138 of its own mass: padding took the rest."""
    networks = [perceptron(1, 10), perceptron(2, 100)]
    pairs = zip(networks, calibration, strict=True)
    own = [fisher_diagonal(*pair, kind=kind) for pair in pairs]
    experts = Experts(networks, calibration=calibration, fishers=own if is_given else None)
    (which,) = Coin(fisher_kind=kind).statistics()
    for found, expected in zip(statistics_of(experts, which), own, strict=True):
        for name in ("0.weight", "0.bias"):
            assert torch.equal(found[name], expected[name])
        head = expected["2.weight"]
        missing = found["2.weight"][len(head) :]
        # Each logit of an exact Fisher is its own row times the features; a class that is not there is no evidence.
        row = head.mean(0) if kind == "exact" else torch.zeros_like(head[0])
        assert_close(missing, row.expand_as(missing))


def test_a_network_that_is_its_head_is_padded():
    layers = [nn.Linear(6, 2), nn.Linear(6, 3)]
    (coded,) = merge_networks(Average(), layers, CODE)
    assert_close(coded.weight[2], 0.6 * layers[1].weight[2])


def test_networks_without_a_head_are_merged_where_they_are_alike():
    merge_networks(Average(), [nn.Bilinear(3, 3, 2), nn.Bilinear(3, 3, 2)], CODE)
    merge_networks(
        Average(), [perceptron(1, 3, nn.Dropout()), perceptron(1, 3, nn.Identity())], CODE
    )


@pytest.fixture
def of_files(write_experts):
    """Return the files of two experts of unequal heads and of an initialisation, and the networks in them."""
    paths = list(map(Path, write_experts([3, 2, 3]).values()))
    networks = [load_network(path).network for path in paths]
    return paths, networks


@pytest.mark.parametrize("method", [Average(batchnorm="keep"), Base()], ids=labels)
def test_experts_in_files_merge_as_those_in_memory(method, of_files):
    paths, networks = of_files
    files = ExpertFiles({"a": paths[0], "b": paths[1]}, paths[2])
    assert files.class_counts == [3, 2]
    found = method.make(Experts(files), CODE[0]).network
    in_memory = Experts(networks[:2], initial=networks[2])
    assert_same_tensors(found, method.make(in_memory, CODE[0]).network)


def test_statistics_in_files_are_read_and_counted(of_files, tmp_path):
    paths, networks = of_files
    images = [torch.randn(6, 3, 16, 16)]
    method = Coin(batchnorm="average")
    in_memory = Experts(networks[:2], calibration=[images, images])
    expected = method.make(in_memory, CODE[0]).network.state_dict()
    (which,) = method.statistics()
    statistics = {}
    for task, network in zip("ab", networks[:2], strict=True):
        statistics[task] = tmp_path / f"{task}.safetensors"
        fisher = fisher_sums(network, images)
        save_statistic(statistics[task], fisher, network, data="own", seconds=2.0)
    files = ExpertFiles({"a": paths[0], "b": paths[1]})
    experts = Experts(files, statistics={which: statistics})
    found = method.make(experts, CODE[0]).network.state_dict()
    assert_close(found, expected)
    assert experts.seconds == 4.0
    assert experts.passes == in_memory.passes


def test_a_shared_initialisation_of_more_classes_than_the_experts_is_refused(write_experts):
    message = "initialisation of 5 classes for experts of up to 3"
    with pytest.raises(ConfigurationError, match=message):
        Experts([perceptron(0, 2), perceptron(1, 3)], initial=perceptron(7, 5))
    first, second, wide = map(Path, write_experts([3, 2, 5]).values())
    with pytest.raises(ConfigurationError, match=message):
        ExpertFiles({"a": first, "b": second}, wide)


# Unlike experts


class Tied(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.words = nn.Embedding(classes, 8)
        self.head = nn.Linear(8, classes, bias=False)
        self.head.weight = self.words.weight


class Early(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.classes = nn.Linear(6, classes)
        self.inner = nn.Linear(6, 6)


UNLIKE = "experts with '{}.*, expected one class and type"
NO_NETWORK = r"found an expert of type .*; load a state dict into one, or compile"
REFUSED = [
    ([Tied(3), Tied(2)], StateError, r"'expert 1' has a tensor 'head\.weight' too many"),
    ([Early(3), Early(2)], StateError, r"1' has tensor 'classes\.weight' of shape \[2, 6\]"),
    ([perceptron(1, 3), perceptron(1, 3)[:2]], StateError, r"'expert 1' has no tensor '2\.bias'"),
    ([nn.Bilinear(3, 3, 3), nn.Bilinear(3, 3, 2)], HeadError, "no Linear layer in Bilinear"),
    (
        [perceptron(1, 3), perceptron(1, 3).float()],
        ConfigurationError,
        UNLIKE.format("0.weight' of torch"),
    ),
    ([perceptron(1, 3), Early(3).double()], ConfigurationError, UNLIKE.format("network' of ")),
    (
        [nn.Sequential(nn.Tanh()), nn.Sequential(nn.ReLU())],
        ConfigurationError,
        UNLIKE.format("0' of Tanh and"),
    ),
    ([{"weight": torch.ones(3, 4)}], ConfigurationError, NO_NETWORK),
    ([torch.compile(nn.Linear(4, 3))], ConfigurationError, NO_NETWORK),
    ([], ConfigurationError, "found no experts"),
]


@pytest.mark.parametrize(("experts", "error", "message"), REFUSED)
def test_what_is_no_experts_of_one_architecture_is_refused(experts, error, message):
    with pytest.raises(error, match=message):
        Experts(experts)


def test_no_experts_have_no_merge():
    with pytest.raises(ConfigurationError, match="found no experts"):
        merge_networks(Average(), [], [[1.0]])


def test_heads_that_do_not_give_the_logits_cannot_be_padded(calibration):
    softmax = [perceptron(1, 3, nn.LogSoftmax(1)), perceptron(2, 2, nn.LogSoftmax(1))]
    message = "the logits of Sequential are not its head '2' of its input"
    with pytest.raises(HeadError, match=message):
        Experts(softmax, calibration=calibration)


# Batches


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


class Named(Plain):
    """The same network, called as Hugging Face's are."""

    def forward(self, first, second):
        logits = super().forward(torch.cat([first, second], 1))
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    "method",
    [Average(batchnorm="recalibrate"), Coin(), RegMean(), HeadFit(), Refit()],
    ids=labels,
)
def test_batches_by_name_merge_as_one_tensor_does(method):
    networks, tasks = near_experts(Plain, (6,), (14, 12, 9))
    batches = [task.split(5) for task in tasks]
    (expected,) = merge_networks(method, networks, [ROW], calibration=batches)
    others = deepcopy(networks)
    for network in others:
        network.__class__ = Named

    def by_name(x):
        return {"first": x[:, :2], "second": x[:, 2:]}

    named = [list(map(by_name, task)) for task in batches]
    (found,) = merge_networks(method, others, [ROW], calibration=named)
    assert_same_tensors(found, expected)
    assert type(found) is Named
    assert vars(found).keys() == vars(expected).keys()


NO_TENSORS = "found a batch of type dict, expected a tensor"
RAGGED = [torch.zeros(10, length) for length in (4, 7)]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([[{"a": torch.zeros(2, 3), "text": ["a", "b"]}], []], NO_TENSORS),
        (
            [[{"a": torch.zeros(2, 3), "b": torch.zeros(3)}], []],
            "or tensors by name of as many samples",
        ),
        ([[(torch.zeros(2, 3),) * 3], []], "type tuple, expected a tensor .*, or ten"),
        ([[], []], "found no calibration batches, expected at least one"),
        (RAGGED, r"found a tensor for a task's calibration, .* write \[tensor\]"),
    ],
)
def test_batches_of_anything_else_are_refused(calibration, message):
    with pytest.raises(DataError, match=message):
        Experts([nn.Linear(3, 3), nn.Linear(3, 3)], calibration=calibration)


def test_samples_of_unlike_shapes_and_labelled_ones_are_pooled():
    networks = [nn.Linear(3, 3) for _ in range(3)]
    labelled = [(batch, torch.zeros(10)) for batch in RAGGED]
    experts = Experts(networks, calibration=[RAGGED, labelled, []])
    shapes = [list(batch.shape) for batch in experts.pooled]
    assert shapes == [[10, 4], [10, 4], [10, 7], [10, 7]]
    assert experts.tasks.tolist() == [0, 1] * 20
    assert experts.samples("pooled")[0].num_samples == 40


# How far experts are apart


def test_the_spread_is_the_median_of_the_matrices_whatever_the_head():
    torch.manual_seed(0)
    weights = [torch.randn(shape).double() for shape in ((50, 4), (30, 50), (3, 30))]
    states = []
    for sign in (1, 0, -1):
        factors = [1 + sign * share * FAR for share in (1, 1, 1000)]
        pairs = zip(weights, factors, strict=True)
        state = {str(place): factor * weight for place, (weight, factor) in enumerate(pairs)}
        states.append(state | {"bias": sign * torch.ones(3)})
    assert spread(states, (0.5, 0.0, 0.5)) == pytest.approx(FAR)


@pytest.mark.parametrize("state", [{"weight": torch.zeros(3, 2)}, {"bias": torch.ones(3)}])
def test_experts_that_agree_or_have_no_matrix_are_not_apart(state):
    assert spread([state, state], (0.3, 0.7)) == 0
