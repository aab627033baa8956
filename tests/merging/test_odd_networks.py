"""Networks that break naive merging: caches, masks, computed, complex and frozen weights."""

from copy import deepcopy

import pytest
import torch
from near_experts import ROW, answers, assert_same_tensors, experts_of, near_experts, perceptron
from torch import nn
from torch.testing import assert_close
from torchmetrics.classification import MulticlassAccuracy

import coin
from coin.errors import StateError
from coin.networks.calling import clone

FITTED = [coin.Coin(), coin.RegMean(), coin.Refit()]
CLOSED_FORMS = [coin.Average(), coin.Coin(), coin.RegMean(), coin.HeadFit()]
OF_EACH_KIND = [coin.Average(), coin.Coin(), coin.Refit()]


def labels(method):
    return method.label


def merged(method, networks, tasks):
    return method.coded_model(experts_of(networks, tasks), ROW).network


# Caches


class Caching(nn.Module):
    """Attention biases that are gathered once in eval mode and kept until `train`, as timm's LeViT does."""

    def __init__(self):
        super().__init__()
        self.biases = nn.Parameter(torch.randn(3))
        self.cache = {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        gathered = self.biases[[0, 1, 2, 1, 0]]
        if not self.training:
            gathered = self.cache.setdefault("cpu", gathered.detach())
        return (x + gathered).tanh()


def caching():
    return nn.Sequential(nn.Linear(4, 5), Caching(), nn.Linear(5, 3))


@pytest.mark.parametrize("method", [*CLOSED_FORMS, coin.Refit()], ids=labels)
def test_networks_that_cache_answer_as_without_a_cache(method):
    networks, tasks = near_experts(caching, (4,))
    for network in networks:
        network.train().eval()  # of what was cached before it was moved
    before = [answers(network, tasks[0]) for network in networks]
    made = merged(method, networks, tasks)
    uncached = deepcopy(made).train()  # in which nothing else depends on the mode
    assert_close(answers(made, tasks[0]), answers(uncached, tasks[0]))
    for network, answer in zip(networks, before, strict=True):
        assert_close(answers(network, tasks[0]), answer)


# Buffers that are no statistics


class Causal(nn.Module):
    """Attention of 4 tokens to those before them, by a mask of −∞; the head's weight has a second name."""

    def __init__(self, scale):
        super().__init__()
        self.query = nn.Linear(5, 5)
        self.embedding = nn.Linear(5, 3)
        self.head = nn.Linear(5, 3)
        self.head.weight = self.embedding.weight
        mask = torch.full((4, 4), -torch.inf)
        self.register_buffer("mask", mask.triu(1))
        self.register_buffer("turn", torch.exp(1j * torch.arange(5) / 3))
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x):
        query = (self.scale * self.query(x) * self.turn).real
        attention = (query @ x.mT + self.mask).softmax(-1)
        return self.head((attention @ x).mean(1))


@pytest.mark.parametrize("row", [(1 / 3, 2 / 3), (0.0, 1.0)])
@pytest.mark.parametrize("method", OF_EACH_KIND, ids=labels)
@pytest.mark.filterwarnings("ignore:method 'refit' leaves")
def test_shared_masks_stay_and_buffers_that_are_not_persistent_are_averaged(method, row):
    torch.manual_seed(0)
    networks = [Causal(2.0), Causal(3.0)]
    x = torch.randn(12, 4, 5)
    experts = coin.Experts(networks, calibration=[[x], [x]])
    made = method.coded_model(experts, row).network
    assert made.head.weight is made.embedding.weight  # two names of one parameter
    assert torch.equal(made.mask, networks[0].mask)
    assert torch.equal(made.turn, networks[0].turn)
    assert_close(made.scale, torch.tensor(2 * row[0] + 3 * row[1]))
    assert bool(made(x).isfinite().all())


@pytest.mark.parametrize(("name", "value"), [("turn", torch.inf), ("mask", torch.nan)])
def test_buffers_whose_average_is_no_number_are_refused(name, value):
    networks = [Causal(2.0), Causal(3.0)]
    networks[1].get_buffer(name)[..., 1] = value
    message = rf"^the coded model of method 'soup' is not finite: tensor '{name}'"
    with pytest.raises(StateError, match=message):
        coin.merge_networks(coin.Average(label="soup"), networks, [[0.5, 0.5]])


# Computed weights


def pruned(layer):
    nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    return layer


COMPUTED = [
    nn.utils.weight_norm,
    nn.utils.spectral_norm,
    nn.utils.parametrizations.weight_norm,
    pruned,
]


@pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:method 'refit'")
@pytest.mark.parametrize("method", OF_EACH_KIND, ids=labels)
@pytest.mark.parametrize("wrap", COMPUTED)
def test_identical_experts_whose_weights_are_computed_merge_to_themselves(wrap, method):
    torch.manual_seed(0)
    layers = (
        nn.Linear(4, 5),
        wrap(nn.Linear(5, 6)),
        nn.Tanh(),
        nn.Linear(6, 3),
    )
    network = nn.Sequential(*layers).double().eval()
    x = torch.randn(12, 4).double()
    experts = coin.Experts([network, clone(network)], calibration=[[x], [x]])
    made = method.coded_model(experts, (0.5, 0.5)).network
    assert_close(made(x), network(x))


# Frozen parameters


@pytest.mark.parametrize("method", CLOSED_FORMS, ids=labels)
def test_what_was_frozen_stays_to_the_last_bit_and_the_rest_merges(method):
    networks, tasks = near_experts(lambda: perceptron(6, 8, 3), (6,))
    for network in networks:
        network[0] = deepcopy(networks[0][0]).requires_grad_(False)
    coded = merged(method, networks, tasks)
    for name, tensor in coded.state_dict().items():
        is_own = torch.equal(tensor, networks[0].state_dict()[name])
        assert is_own == name.startswith("0."), name
    assert [each.requires_grad for each in networks[0].parameters()] == [False, False, True, True]


@pytest.mark.parametrize("method", CLOSED_FORMS[1:], ids=labels)
def test_what_is_frozen_in_one_expert_alone_is_averaged(method):
    networks, tasks = near_experts(lambda: perceptron(6, 8, 3), (6,))
    networks[1][0].requires_grad_(False)
    coded = merged(method, networks, tasks)
    average = merged(coin.Average(), networks, tasks)
    assert_same_tensors(coded[0], average[0])
    assert not torch.allclose(coded[2].weight, average[2].weight, atol=1e-6)


@pytest.mark.parametrize("method", FITTED, ids=labels)
def test_networks_that_are_frozen_altogether_merge_as_if_they_were_not(method):
    networks, tasks = near_experts(lambda: perceptron(6, 8, 3), (6,))
    frozen = [deepcopy(network).requires_grad_(False) for network in networks]
    assert_same_tensors(merged(method, frozen, tasks), merged(method, networks, tasks))


# Networks that write, keep and hold


def writing(inplace=True):
    return nn.Sequential(
        nn.SiLU(inplace),
        nn.Linear(4, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )


@pytest.mark.parametrize("method", FITTED, ids=labels)
def test_inputs_that_a_network_writes_over_are_its_own(method):
    """The second expert read what the first had left: 11 % off; and so did the caller."""
    networks, tasks = near_experts(writing, (4,))
    plain, untouched = near_experts(lambda: writing(inplace=False), (4,))
    coded = merged(method, networks, tasks)
    for task, other in zip(tasks, untouched, strict=True):
        assert torch.equal(task, other)
    assert_same_tensors(coded, merged(method, plain, untouched))


def test_activations_that_a_network_keeps_are_not_copied():
    networks, tasks = near_experts(writing, (4,))
    expected = merged(coin.Coin(), networks, tasks)
    for network in networks:
        network.kept = [network[1].weight * 2]
    assert_same_tensors(merged(coin.Coin(), networks, tasks), expected)


def hold_another(networks):
    """A copy's hook went on reading expert 0: answers 79 % off."""
    for network in networks:
        scale = network[1].bias
        network[2].register_forward_hook(lambda module, given, output, scale=scale: output * scale)


def hold_the_network(networks):
    """A copy's hook went on writing to expert 0: answers 79 % off."""
    first = networks[0]
    first[1].register_forward_hook(lambda *given: setattr(first, "kept", given))


def hold_what_is_made(networks):
    for network in networks:
        made = network[1].weight.detach().abs()
        network[1].forward = lambda x, made=made: x @ made.T


ANOTHER = "a copy of the first Sequential with the last one's tensors does not answer"
REFUSED = [
    (hold_another, ANOTHER),
    (hold_the_network, "layer '1' of Sequential holds a function of a module"),
    (hold_what_is_made, f"{ANOTHER}.* keep nothing made of them in an attribute"),
]


@pytest.mark.parametrize(("hold", "message"), REFUSED)
def test_what_holds_tensors_that_a_copy_has_not_is_refused(hold, message):
    networks, tasks = near_experts(writing, (4,))
    for network in networks:
        network[1].accuracy = MulticlassAccuracy(3)  # makes its functions anew in a copy
    merged(coin.Average(), networks, tasks)
    hold(networks)
    with pytest.raises(StateError, match=message):
        merged(coin.Average(), networks, tasks)
