"""Networks that break naive merging: caches, masks, computed, complex and frozen weights."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchmetrics.classification import MulticlassAccuracy

import coin
from coin.errors import HeadError, StateError
from coin.networks.calling import clone

PAIR = (0.5, 0.5)


def labels(method):
    return method.label


def moved(network, seed, by=0.1):
    """Return a network near another: an expert of the same initialisation."""
    draw = torch.Generator().manual_seed(seed)
    other = clone(network)
    for parameter in other.parameters():
        step = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.data.add_(by * step.to(parameter))
    return other


def batches(*shape, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return [[torch.randn(12, *shape, generator=draw, dtype=dtype)] for _ in range(2)]


def merged(method, experts, row=PAIR, **given):
    return method.coded_model(coin.Experts(experts, **given), row).network


def assert_equal(network, other):
    for name, tensor in other.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


# Caches


class Caching(nn.Module):
    """Attention biases that are gathered once in eval mode and kept until `train`, as timm's LeViT does."""

    def __init__(self):
        super().__init__()
        self.biases = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.cache = {}

    @torch.no_grad()
    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        gathered = self.biases[[0, 1, 2, 1, 0]]
        if not self.training:
            gathered = self.cache.setdefault("cpu", gathered)
        return (x + gathered).tanh()


@pytest.mark.parametrize(
    "method", [coin.Average(), coin.Coin(), coin.RegMean(), coin.HeadFit(), coin.Refit()], ids=labels
)
def test_networks_that_cache_answer_as_without_a_cache(method):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), Caching(), nn.Linear(5, 3)).double().eval()
    experts = [moved(network, 1), moved(network, 2)]
    x = torch.randn(5, 4, dtype=torch.float64)
    before = [expert(x) for expert in experts]
    made = merged(method, experts, calibration=batches(4))
    uncached = deepcopy(network).train()  # in which nothing else depends on the mode
    uncached.load_state_dict(made.state_dict())
    assert_close(made(x), uncached(x))
    for expert, answer in zip(experts, before, strict=True):
        assert_close(expert(x), answer)


# Buffers that are no statistics


class Causal(nn.Module):
    """Attention of 4 tokens to those before them, by a mask of −∞; the head's weight has a second name."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.query = nn.Linear(5, 5)
        self.embedding = nn.Linear(5, 3)
        self.head = nn.Linear(5, 3)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("turn", torch.exp(1j * torch.arange(5) / 3))
        self.register_buffer("scale", torch.tensor([1.0 + seed]), persistent=False)

    def forward(self, x):
        query = (self.scale * self.query(x) * self.turn).real
        attention = (query @ x.mT + self.mask).softmax(-1)
        return self.head((attention @ x).mean(1))


@pytest.mark.parametrize("row", [(1 / 3, 2 / 3), (0.0, 1.0)])
@pytest.mark.parametrize("method", [coin.Average(), coin.Coin(), coin.Refit()], ids=labels)
@pytest.mark.filterwarnings("ignore:method 'refit' leaves")
def test_shared_masks_stay_and_buffers_that_are_not_persistent_are_averaged(method, row):
    networks = [Causal(1), Causal(2)]
    calibration = batches(4, 5, dtype=torch.float32)
    made = merged(method, networks, row, calibration=calibration)
    assert made.head.weight is made.embedding.weight  # two names of one parameter
    assert torch.equal(made.mask, networks[0].mask)
    assert torch.equal(made.turn, networks[0].turn)
    assert_close(made.scale, torch.tensor([2 * row[0] + 3 * row[1]]))
    assert bool(made(calibration[0][0]).isfinite().all())
    if method.name == "average":
        wanted = row[0] * networks[0].head.weight + row[1] * networks[1].head.weight
        assert_close(made.head.weight, wanted)


@pytest.mark.parametrize(("name", "value"), [("turn", torch.inf), ("mask", torch.nan)])
def test_buffers_whose_average_is_no_number_are_refused(name, value):
    networks = [Causal(1), Causal(2)]
    networks[1].get_buffer(name)[..., 1] = value
    message = rf"^the coded model of method 'soup' is not finite: tensor '{name}'"
    with pytest.raises(StateError, match=message):
        merged(coin.Average(label="soup"), networks)


# Computed weights


def pruned(layer):
    nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:method 'refit'")
@pytest.mark.parametrize("method", [coin.Average(), coin.Coin(), coin.Refit()], ids=labels)
@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        pruned,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ],
)
def test_identical_experts_whose_weights_are_computed_merge_to_themselves(wrap, method):
    torch.manual_seed(0)
    layers = nn.Linear(4, 5), nn.Tanh(), wrap(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 3)
    expert = nn.Sequential(*layers).double().eval()
    made = merged(method, [expert, clone(expert)], calibration=batches(4))
    x = torch.randn(5, 4, dtype=torch.float64)
    assert_close(made(x), expert(x))


# Frozen parameters


def perceptrons(bodies):
    """Return two networks with heads of their own, on one body or on two."""
    networks = []
    for place in (0, 1):
        torch.manual_seed(place % bodies)
        network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        torch.manual_seed(5 + place)
        network[2].reset_parameters()
        networks.append(network)
    return networks


CLOSED_FORMS = [coin.Average(), coin.Coin(), coin.RegMean(), coin.HeadFit()]


@pytest.mark.parametrize("method", CLOSED_FORMS, ids=labels)
def test_what_was_frozen_stays_to_the_last_bit_and_the_rest_merges(method):
    experts = perceptrons(bodies=1)
    for expert in experts:
        expert[0].requires_grad_(False)
    coded = merged(method, experts, (0.3, 0.7), calibration=batches(6))
    for name, tensor in coded.state_dict().items():
        is_own = torch.equal(tensor, experts[0].state_dict()[name])
        assert is_own == name.startswith("0."), name
    for expert in experts:
        assert [each.requires_grad for each in expert.parameters()] == [False, False, True, True]


@pytest.mark.parametrize("method", [coin.Coin(), coin.RegMean(), coin.Refit()], ids=labels)
def test_networks_that_are_frozen_altogether_merge_as_if_they_were_not(method):
    experts = perceptrons(bodies=2)
    frozen = [deepcopy(expert).requires_grad_(False) for expert in experts]
    found = merged(method, frozen, calibration=batches(6))
    assert_equal(found, merged(method, experts, calibration=batches(6)))
    for expert in frozen:
        assert not any(parameter.requires_grad for parameter in expert.parameters())


@pytest.mark.parametrize("method", CLOSED_FORMS[1:], ids=labels)
def test_what_is_frozen_in_one_expert_alone_is_averaged(method):
    experts = perceptrons(bodies=2)
    experts[1][0].requires_grad_(False)
    coded = merged(method, experts, calibration=batches(6))
    average = merged(coin.Average(), experts)
    assert torch.equal(coded[0].weight, average[0].weight)
    assert torch.equal(coded[0].bias, average[0].bias)
    assert not torch.allclose(coded[2].weight, average[2].weight, atol=1e-6)


# Networks that write, keep and hold


def writing(inplace=True):
    layers = nn.SiLU(inplace), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("method", [coin.Coin(), coin.RegMean(), coin.Refit()], ids=labels)
def test_inputs_that_a_network_writes_over_are_its_own(method):
    """The second expert read what the first had left: 11 % off; and so did the caller."""
    experts = [moved(writing(), seed) for seed in range(2)]
    plain = [writing(inplace=False) for _ in experts]
    for one, other in zip(plain, experts, strict=True):
        one.load_state_dict(other.state_dict())
    given = batches(4)
    coded = merged(method, experts, calibration=given)
    assert torch.equal(given[0][0], batches(4)[0][0])
    assert_equal(coded, merged(method, plain, calibration=given))
    answers = coin.Coded([PAIR], experts, [coded]).answers(given[0][0])
    assert_close(answers.experts[1], plain[1](given[0][0]).detach())


def test_activations_that_a_network_keeps_are_not_copied():
    experts = [moved(writing(), seed) for seed in range(2)]
    expected = merged(coin.Coin(), experts, calibration=batches(4))
    for expert in experts:
        expert.kept = [expert[1].weight * 2]
    assert_equal(merged(coin.Coin(), experts, calibration=batches(4)), expected)


def test_a_function_that_holds_another_expert_is_refused():
    """A copy's hook went on reading expert 0: answers 79 % off."""
    experts = [moved(writing(inplace=False), seed, by=1) for seed in range(2)]
    for expert in experts:
        scale = expert[1].bias
        expert[2].register_forward_hook(lambda module, given, output, scale=scale: output * scale)
    message = "a copy of the first Sequential with the last one's tensors does not answer"
    with pytest.raises(StateError, match=message):
        merged(coin.Average(), experts, calibration=batches(4))


def test_a_function_that_holds_the_network_is_refused():
    """A copy's hook went on writing to expert 0: answers 79 % off."""
    experts = [writing() for _ in range(2)]
    for expert in experts:
        expert.accuracy = MulticlassAccuracy(3)  # makes its functions anew in a copy
    merged(coin.Average(), experts)
    for expert in experts:
        expert[1].register_forward_hook(lambda module, given, output, e=expert: None)
    merged(coin.Average(), experts)
    expert = experts[0]
    experts[0][1].register_forward_hook(lambda module, given, output: setattr(expert, "kept", output))
    for refused in (
        lambda: merged(coin.Average(), experts),
        lambda: coin.compress(experts[0], None, bits=4, base_bits=0).network(),
    ):
        with pytest.raises(StateError, match="layer '1' of Sequential holds a function of a module"):
            refused()


class Keeping(nn.Module):
    """It keeps what it made of its weight at its first pass."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.made = None

    def forward(self, x):
        if self.made is None:
            self.made = self.map.weight.detach().abs()
        return self.head(x @ self.made)


def test_what_a_network_made_of_its_weights_is_not_merged():
    experts = [Keeping().eval() for _ in range(2)]
    calibration = batches(6, dtype=torch.float32)
    message = r"a copy of the first Keeping .* keep nothing made of them in an attribute"
    with pytest.raises(StateError, match=message):
        coin.merge_networks(coin.Average(), experts, [PAIR], calibration=calibration)


class Early(nn.Module):
    """A sample that is easy leaves before the head."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        logits = self.head(self.map(x))
        return torch.where(x[:, :1] > 10, x[:, :3], logits)


def test_an_exit_of_a_later_sample_is_seen():
    inputs = torch.randn(30, 6)
    inputs[20, 0] = 11
    with pytest.raises(HeadError, match="are not its head"):
        coin.networks.linear_heads([Early().eval()], inputs)
