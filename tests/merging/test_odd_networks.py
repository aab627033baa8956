"""Networks that break naive merging: caches, masks, computed, complex and frozen weights."""

from copy import deepcopy
from operator import attrgetter

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import coin
from coin.errors import ConfigurationError, HeadError, StateError
from coin.networks import NetworkConfig, load_network, save_network, sources
from coin.networks.calling import clone

CLASSES = 3


def moved(network, seed, by=0.1):
    """A network near another: an expert of the same initialisation."""
    other, draw = clone(network), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter))
    return other


def batches(*shape, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return [[torch.randn(12, *shape, generator=draw, dtype=dtype)] for _ in range(2)]


def merged(method, experts, row=(0.5, 0.5), **given):
    return method.coded_model(coin.Experts(experts, **given), row).network


by_label = attrgetter("label")

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
        if mode and self.cache:
            self.cache = {}
        return self

    def forward(self, x):
        if self.training:
            return (x + self.biases[[0, 1, 2, 1, 0]]).tanh()
        if "cpu" not in self.cache:
            self.cache["cpu"] = self.biases[[0, 1, 2, 1, 0]]
        return (x + self.cache["cpu"]).tanh()


def cached():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), Caching(), nn.Linear(5, CLASSES)).double().eval()


@pytest.mark.parametrize(
    "method", [coin.Average(), coin.Coin(), coin.RegMean(), coin.HeadFit(), coin.Refit()], ids=by_label
)
def test_merges_of_networks_that_cache(method):
    """The coded model and the experts answer as they do without a cache, whatever was cached before."""
    experts = [moved(cached(), 1).eval(), moved(cached(), 2).eval()]
    with torch.no_grad():
        answers = [expert(batches(4)[0][0]) for expert in experts]
    made = merged(method, experts, calibration=batches(4))
    uncached = cached().train()  # which nothing else in it looks at
    uncached.load_state_dict(made.state_dict())
    x = batches(4, seed=1)[0][0]
    torch.testing.assert_close(made(x), uncached(x))
    torch.testing.assert_close(experts[0](batches(4)[0][0]), answers[0])


# Buffers that are no statistics


class Causal(nn.Module):
    """Attention of 4 tokens to those before them, by a mask of −∞; the head's weight has a second name."""

    def __init__(self, num_classes=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.query, self.embedding, self.head = nn.Linear(5, 5), nn.Linear(5, num_classes), nn.Linear(5, num_classes)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("turn", torch.exp(1j * torch.arange(5) / 3))
        self.register_buffer("scale", torch.tensor([1.0 + seed]), persistent=False)

    def forward(self, x):
        query = (self.scale * self.query(x) * self.turn).real
        return self.head(((query @ x.mT + self.mask).softmax(-1) @ x).mean(1))


@pytest.mark.parametrize("row", [(1 / 3, 2 / 3), (0.0, 1.0)])
@pytest.mark.parametrize("method", [coin.Average(), coin.Coin(), coin.Refit()], ids=by_label)
@pytest.mark.filterwarnings("ignore:method 'refit' leaves")
def test_a_mask_that_all_experts_share_stays_and_buffers_that_are_not_persistent_are_averaged(method, row):
    networks, calibration = [Causal(seed=1), Causal(seed=2)], batches(4, 5, dtype=torch.float32)
    made = merged(method, networks, row, calibration=calibration)
    assert made.head.weight is made.embedding.weight  # two names of one parameter
    if method.name == "average":
        wanted = sum(weight * network.head.weight for weight, network in zip(row, networks, strict=True))
        torch.testing.assert_close(made.head.weight, wanted)
    assert torch.equal(made.mask, networks[0].mask)
    assert torch.equal(made.turn, networks[0].turn)
    torch.testing.assert_close(made.scale, torch.tensor([2 * row[0] + 3 * row[1]]))
    assert bool(made(calibration[0][0]).isfinite().all())


def test_a_nan_in_a_buffer_or_an_infinity_in_one_without_is_refused():
    networks = [Causal(seed=1), Causal(seed=2)]
    networks[1].turn[2] = torch.inf
    for name in ("turn", "mask"):
        with pytest.raises(StateError, match=rf"^the coded model of method 'soup' is not finite: tensor '{name}'"):
            merged(coin.Average(label="soup"), networks)
        networks[1].turn[2] = networks[0].turn[2]
        networks[1].mask[2, 1] = torch.nan


def test_a_network_with_a_mask_goes_through_a_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.Own.kinds, "causal", Causal)
    config, path, network = NetworkConfig("causal", 4), tmp_path / "net.safetensors", Causal()
    save_network(path, network, config, 3, {})
    loaded = load_network(path)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in loaded.network.state_dict().items())


# Computed weights


def pruned(layer):
    nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:method 'refit'")
@pytest.mark.parametrize("method", [coin.Average(), coin.Coin(), coin.Refit()], ids=by_label)
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
    layers = [nn.Linear(4, 5), nn.Tanh(), wrap(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, CLASSES)]
    expert = nn.Sequential(*layers).double().eval()
    made = merged(method, [expert, clone(expert)], calibration=batches(4))
    x = batches(4, seed=1)[0][0]
    torch.testing.assert_close(made(x), expert(x))


# Frozen parameters

METHODS = [coin.Average(), coin.Coin(), coin.RegMean(), coin.HeadFit()]
HEAD = ("2.weight", "2.bias")


def frozen(base, dtype=torch.float64):
    """Two networks with heads of their own, of one body, or of two."""
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed * base)
        networks.append(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype))
        torch.manual_seed(1 + seed)
        networks[-1][2].reset_parameters()
    return networks


def flags(networks):
    return [[p.requires_grad for p in network.parameters()] for network in networks]


@pytest.mark.parametrize("method", METHODS, ids=by_label)
def test_what_was_frozen_stays_to_the_last_bit_and_the_rest_merges(method):
    experts = frozen(0, torch.float32)
    for expert in experts:
        expert[0].requires_grad_(False)
    found = flags(experts)
    coded = merged(method, experts, (0.3, 0.7), calibration=batches(6, dtype=torch.float32))
    assert flags(experts) == found
    for name, tensor in coded.state_dict().items():
        assert torch.equal(tensor, experts[0].state_dict()[name]) == (name not in HEAD)


@pytest.mark.parametrize("method", [coin.Coin(), coin.RegMean(), coin.Refit()], ids=by_label)
def test_networks_that_are_frozen_altogether_merge_as_if_they_were_not(method):
    experts = frozen(3)
    whole = [deepcopy(expert).requires_grad_(False) for expert in experts]
    expected, found = (merged(method, each, calibration=batches(6)).state_dict() for each in (experts, whole))
    assert not any(map(any, flags(whole)))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("method", METHODS[1:], ids=by_label)
def test_what_is_frozen_in_one_expert_alone_is_averaged(method):
    experts = frozen(3)
    experts[1][0].requires_grad_(False)
    coded, average = merged(method, experts, calibration=batches(6)), merged(coin.Average(), experts).state_dict()
    for name, tensor in coded.state_dict().items():
        if name not in HEAD:
            assert torch.equal(tensor, average[name])
        elif name == HEAD[0]:  # the Fisher of a bias is the same for all experts
            assert (tensor - average[name]).abs().max() > 1e-6


def overwriting(inplace=True):
    return nn.Sequential(nn.SiLU(inplace), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


@pytest.mark.parametrize("method", [coin.Coin(), coin.RegMean(), coin.Refit()], ids=by_label)
def test_inputs_that_a_network_writes_over_are_its_own(method):
    """The second expert read what the first had left: 11 % off; and so did the caller."""
    torch.manual_seed(0)
    experts = [moved(overwriting(), seed) for seed in range(2)]
    plain = [overwriting(inplace=False) for _ in experts]
    for one, other in zip(plain, experts, strict=True):
        one.load_state_dict(other.state_dict())
    given = batches(4)
    found, expected = (merged(method, each, calibration=given).state_dict() for each in (experts, plain))
    assert torch.equal(given[0][0], batches(4)[0][0])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    coded = coin.Coded([[0.5, 0.5]], experts, [merged(method, experts, calibration=given)])
    answers = coded.answers(given[0][0]).experts[1]
    torch.testing.assert_close(answers, experts[1](given[0][0].clone()).detach())


def test_a_network_that_mixes_samples_is_refused():
    """Identical experts were 3 to 15 % off."""
    layers = nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6, track_running_stats=False), nn.Flatten(), nn.Linear(18, CLASSES)
    experts = [nn.Sequential(*layers).double()] * 2
    with pytest.raises(StateError, match="gives a sample other outputs beside others than alone, or at every call"):
        merged(coin.Refit(), experts, calibration=batches(4, 3))


def test_batches_of_one_list_functions_that_write_and_activations_that_stay():
    experts = [moved(overwriting(), seed) for seed in range(2)]
    expected = merged(coin.Coin(), experts, calibration=batches(4)).state_dict()
    for expert in experts:
        expert.kept = [expert[1].weight * 2]
    found = merged(coin.Coin(), experts, calibration=[[[each[0]]] for each in batches(4)]).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_function_that_holds_another_expert_is_refused():
    """A copy's hook went on reading expert 0: answers 79 % off."""
    experts = [moved(overwriting(inplace=False), seed, by=1) for seed in range(2)]
    merged(coin.Average(), experts, calibration=batches(4))
    for expert in experts:
        expert[2].register_forward_hook(lambda module, inputs, output, scale=expert[1].bias: output * scale)
    with pytest.raises(StateError, match="a copy of the first Sequential with the last one's tensors does not answer"):
        merged(coin.Average(), experts, calibration=batches(4))


@pytest.mark.parametrize("given", [{"weight": torch.ones(3, 4)}, torch.compile(nn.Linear(4, 3))])
def test_what_is_no_network_or_compiled_is_refused(given):
    with pytest.raises(ConfigurationError, match=r"found an expert of type .*; load a state dict into one, or compile"):
        coin.Experts([given, given])


def test_a_function_that_holds_the_network_is_refused():
    """A copy's hook went on writing to expert 0: answers 79 % off."""
    experts = [overwriting() for _ in range(2)]
    for expert in experts:
        expert[1].register_forward_hook(lambda module, inputs, output, expert=None, kept=expert: None)
        expert.accuracy = MulticlassAccuracy(CLASSES)  # makes its functions anew in a copy
    merged(coin.Average(), experts)
    for expert in experts:
        expert[1].register_forward_hook(lambda module, inputs, output: setattr(expert, "kept", output))  # noqa: B023
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
        self.map, self.head, self.made = nn.Linear(6, 6), nn.Linear(6, 3), None

    def forward(self, x):
        if self.made is None:
            self.made = self.map.weight.detach().abs()
        return self.head(x @ self.made)


class Early(nn.Module):
    """A sample that is easy leaves before the head."""

    def __init__(self):
        super().__init__()
        self.map, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        logits = self.head(self.map(x))
        return torch.where(x[:, :1] > 10, x[:, :3], logits)


def test_what_a_network_made_of_its_weights_is_not_merged():
    experts = [Keeping().eval() for _ in range(2)]
    with pytest.raises(StateError, match=r"a copy of the first Keeping .* keep nothing made of them in an attribute"):
        coin.merge_networks(coin.Average(), experts, [[0.5, 0.5]], calibration=[[torch.randn(9, 6)]] * 2)


def test_an_exit_of_a_later_sample_is_seen():
    network, inputs = Early().eval(), torch.randn(30, 6)
    inputs[20, 0] = 11
    with pytest.raises(HeadError, match="are not its head"):
        coin.networks.linear_heads([network], inputs)


def test_gradient_checkpointing_is_to_be_off():
    experts = [nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval() for _ in range(2)]
    for expert in experts:
        expert.grad_checkpointing = True
    with pytest.raises(ConfigurationError, match=r"call set_grad_checkpointing\(False\)"):
        coin.merge_networks(
            coin.Average(adapters={"rank": 1}), experts, [[0.5, 0.5]], calibration=[[torch.randn(20, 6)]] * 2
        )


def test_heads_in_16_bits_are_of_the_features_type():
    experts = [nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).bfloat16().eval() for _ in range(2)]
    system = coin.Coded([[0.5, 0.5]], experts, experts[:1])
    features = system.answers(torch.randn(4, 6), erased=[0, 1], features=True).coded_features[0]
    weight, bias = system.heads()[1]
    assert (features @ weight.T + bias).dtype == torch.float32
