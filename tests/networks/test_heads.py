"""Heads: found by name, replaced, padded; features are their inputs, and logits are theirs of these or refused."""

import re
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import coin
from coin.errors import HeadError, StateError
from coin.networks import check_head, features_and_logits, head_name, pad_head
from coin.networks.heads import padded_state, replace_head


class Network(nn.Module):
    """A body and a head, and what is made of both."""

    def __init__(self, forward, head=None, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.head = nn.Linear(16, 5, bias=bias) if head is None else head
        self.of = forward

    def forward(self, x):
        return self.of(self, x)


class Auxiliary(nn.Module):
    """Its last registered Linear runs, and is not the one that gives the logits."""

    def __init__(self, classes=5, told=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.head = nn.Linear(16, 5)
        self.auxiliary = nn.Linear(16, classes)
        if told is not None:
            self.head_name = told

    def forward(self, x):
        features = self.body(x)
        self.latest = self.auxiliary(features)
        return self.head(features)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


class BaseModel(nn.Module):
    """As Hugging Face's: what has a head on it calls it by this name."""

    base_model_prefix = "encoder"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


class ForClassification(nn.Module):
    base_model_prefix = "encoder"

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(2, 3)
        self.encoder = BaseModel()


class Alias(nn.Module):
    """Its head has two names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.classifier = self.layers[2]
        self.network = self.layers

    def forward(self, x):
        return self.classifier(self.layers[:2](x))


def nested():
    inner = nn.Sequential(nn.Linear(3, 4), nn.Dropout())
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), inner)


def beside_a_norm():
    model = nn.ModuleDict({"model": ForClassification()})
    return nn.ModuleDict({"a": model, "norm": nn.LayerNorm(3)})


HEADS = {
    "the last Linear": (nested, "2.0"),
    "a name that is told": (lambda: Auxiliary(told="head"), "head"),
    "outside of the base model": (ForClassification, "score"),
    "outside of a base model further down": (beside_a_norm, "a.model.score"),
    "a base model alone": (BaseModel, "layer"),
    "the first of two names": (Alias, "layers.2"),
    "the network itself": (lambda: nn.Linear(2, 3), ""),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_head_is_found(case):
    build, name = HEADS[case]
    assert head_name(build()) == name


NO_HEADS = {
    "no Linear": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1)),
        "no Linear layer in Sequential; name the head by an attribute 'head_name'",
    ),
    "a name that is none": (
        lambda: Auxiliary(told="hed"),
        "found head_name 'hed', expected a layer of Auxiliary",
    ),
    "another kind": (
        lambda: Auxiliary(told="body.1"),
        "found a head 'body.1' of type Tanh in Auxiliary, expected a Linear layer",
    ),
}


@pytest.mark.parametrize("case", NO_HEADS)
def test_a_network_without_a_linear_head_is_refused(case):
    build, message = NO_HEADS[case]
    with pytest.raises(StateError, match=message):
        replace_head(build(), 3)


def test_adapters_leave_a_head_of_two_names_alone():
    """The head had adapters, and a loaded system refused them."""
    network = Alias()
    experts = [deepcopy(network), deepcopy(network)]
    for expert in experts:
        nn.init.normal_(expert.classifier.weight)
    inputs = [torch.randn(30, 4)]
    adapted = coin.fit_adapters(network, experts, [inputs, inputs], rank=1)
    assert not any(name.startswith("layers.2.") for name in adapted.adapters[0].changes)


@pytest.mark.parametrize("bias", [True, False])
def test_a_replaced_head_keeps_its_place_inputs_and_bias(bias):
    network = nn.Sequential(
        nn.Linear(5, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 1000, bias=bias))
    )
    replace_head(network, 3)
    assert network(torch.zeros(2, 5)).shape == (2, 3)
    assert (network[1][1].bias is not None) == bias
    alias = Alias()
    replace_head(alias, 7)
    assert alias(torch.zeros(2, 4)).shape == (2, 7)


def test_features_are_the_heads_input():
    network = Auxiliary(told="head")
    inputs = torch.randn(2, 6)
    features, logits = features_and_logits(network, inputs)
    torch.testing.assert_close(features, network.body(inputs))
    torch.testing.assert_close(logits, network(inputs))


UNREADABLE = {
    "positions": (
        lambda net, x: net.head(net.body(x))[:, -1],
        torch.zeros(2, 5, 6),
        r"reads inputs \[2, 5, 16\], expected one row a sample",
    ),
    "two passes": (
        lambda net, x: net.head(net.body(x)) + net.head(net.body(-x)),
        torch.zeros(1, 6),
        "ran 2 times in one pass, expected once",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_head_without_one_input_a_sample_is_refused(case):
    forward, inputs, message = UNREADABLE[case]
    with pytest.raises(HeadError, match=message):
        features_and_logits(Network(forward), inputs)


def plain(net, x):
    return net.head(net.body(x))


RIGHT = {
    "linear": lambda: Network(plain),
    "no bias": lambda: Network(plain, bias=False),
    "auxiliary, told": lambda: Auxiliary(told="head"),
}
WRONG = {
    "temperature": lambda: Network(lambda net, x: plain(net, x) / 2),
    "softmax": lambda: Network(lambda net, x: plain(net, x).softmax(1)),
    "residual": lambda: Network(lambda net, x: plain(net, x) + x[:, :5]),
    "cosine": lambda: Network(lambda net, x: 8 * plain(net, x), Cosine(16, 5, bias=False)),
    "auxiliary": Auxiliary,
    "auxiliary of another width": lambda: Auxiliary(classes=4),
}


@torch.no_grad()
def run(build, dtype=torch.float32):
    """Return a network with its features and logits of some inputs."""
    torch.manual_seed(0)
    network = build().to(dtype).eval()
    features, logits = features_and_logits(network, torch.randn(7, 6).to(dtype))
    return network, features, logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", RIGHT)
def test_logits_that_are_the_head_of_its_input_pass(case, dtype):
    check_head(*run(RIGHT[case], dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", WRONG)
def test_logits_that_are_not_are_refused(case, dtype):
    network, features, logits = run(WRONG[case], dtype)
    found = re.escape(
        f"the logits of {type(network).__name__} are not its head '{head_name(network)}'"
    )
    with pytest.raises(
        HeadError, match=rf"{found} of .*difference.*attribute 'head_name', or leave"
    ):
        check_head(network, features, logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_passes_where_large_terms_cancel(dtype):
    """The tolerance is in the size of the sum's terms: here a thousand times that of the logits."""
    torch.manual_seed(0)
    head = nn.Linear(64, 5, dtype=dtype)
    with torch.no_grad():
        head.weight[:, 32:] = -head.weight[:, :32]
    half = 1000 * torch.randn(50, 32)
    rest = half + torch.randn(50, 32)
    inputs = torch.cat([half, rest], 1).to(dtype)
    check_head(head, *features_and_logits(head, inputs))
    with pytest.raises(StateError, match="difference"):
        check_head(head, inputs, head(inputs) + 300)


def test_logits_of_autocast_pass_and_wrong_ones_do_not():
    network, *_ = run(RIGHT["linear"])
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = features_and_logits(network, torch.randn(7, 6))
    check_head(network, features, logits)
    with pytest.raises(StateError, match="difference"):
        check_head(network, features, logits / 1.2)


def test_logits_of_medium_precision_pass_where_it_is_set():
    network, features, logits = run(RIGHT["linear"])
    rounded = logits.bfloat16().float() + 0.01 * logits
    with pytest.raises(StateError, match="difference"):
        check_head(network, features, rounded)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        check_head(network, features, rounded)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("mean", "weight", "bias"),
    [(False, [0.0, 0.0, 0.0], 0.0), (True, [8.0, 7.0, 9.5], 1.5)],
    ids=["zeros", "the mean of its own"],
)
def test_a_head_s_state_is_padded(mean, weight, bias):
    own = torch.tensor([[7.0, 8.0, 9.0], [9.0, 6.0, 10.0]])
    state = {"fc.weight": own, "fc.bias": torch.tensor([1.0, 2.0]), "body": torch.ones(4)}
    padded = padded_state(state, "fc", 4, mean=mean)
    assert padded["fc.weight"].tolist() == [*own.tolist(), weight, weight]
    assert padded["fc.bias"].tolist() == [1.0, 2.0, bias, bias]
    assert padded["body"] is state["body"]
    assert padded_state(state, "fc", 2) is state


@pytest.mark.parametrize("outputs", [2, 5])
def test_a_head_of_other_outputs_has_the_first_rows_of_its_own_and_then_zeros(outputs):
    network = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).requires_grad_(False)
    padded = pad_head(network, outputs)
    x = torch.randn(6, 4)
    expected = torch.zeros(6, outputs)
    rows = min(3, outputs)
    expected[:, :rows] = network(x)[:, :rows]
    torch.testing.assert_close(padded(x), expected)
    assert padded[0].weight is network[0].weight
    assert not padded[1].weight.requires_grad
    assert network[1].weight.shape == (3, 5)
    assert pad_head(network, 3) is network
