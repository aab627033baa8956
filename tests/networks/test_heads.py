"""Heads: found by name, replaced, padded; features are their inputs, and logits are theirs of these or refused."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coin.errors import HeadError, StateError
from coin.networks import check_head, features_and_logits, head_name, pad_head
from coin.networks.heads import padded_state, replace_head


def plain(net, x):
    return net.head(net.body(x))


class Network(nn.Module):
    """A body, a head, and a layer that runs beside it; `of` makes logits of them."""

    def __init__(self, of=plain, head=None, beside=None, told=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.head = head or nn.Linear(16, 5)
        self.beside = beside or nn.Identity()
        self.of = of
        self.head_name = told

    def forward(self, x):
        self.latest = self.beside(self.body(x))
        return self.of(self, x)


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

    def forward(self, x):
        return self.classifier(self.layers[:2](x))


HEADS = {
    "the last Linear": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.ReLU()), "1"),
    "a name that is told": (lambda: Network(beside=nn.Linear(16, 5), told="head"), "head"),
    "outside of the base model": (
        lambda: nn.ModuleDict({"a": ForClassification(), "norm": nn.LayerNorm(3)}),
        "a.score",
    ),
    "a base model alone": (BaseModel, "layer"),
    "the first of two names": (Alias, "layers.2"),
    "the network itself": (lambda: nn.Linear(2, 3), ""),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_head_is_found(case):
    build, name = HEADS[case]
    assert head_name(build()) == name


NO_HEADS = {
    "no Linear layer in Conv2d; name the head by": lambda: nn.Conv2d(3, 4, 1),
    "found head_name 'hed', expected a layer of Network": lambda: Network(told="hed"),
    "found a head 'body.1' of type Tanh in Network, expected": lambda: Network(told="body.1"),
}


@pytest.mark.parametrize("message", NO_HEADS)
def test_a_network_without_a_linear_head_is_refused(message):
    with pytest.raises(StateError, match=message):
        replace_head(NO_HEADS[message](), 3)


@pytest.mark.parametrize("bias", [True, False])
def test_a_replaced_head_keeps_its_place_inputs_and_bias(bias):
    inner = nn.Sequential(nn.ReLU(), nn.Linear(5, 1000, bias=bias))
    network = nn.Sequential(nn.Linear(5, 5), inner)
    replace_head(network, 3)
    assert network(torch.zeros(2, 5)).shape == (2, 3)
    assert (inner[1].bias is not None) == bias


def test_a_head_of_two_names_is_replaced_under_both():
    network = Alias()
    replace_head(network, 7)
    assert network(torch.zeros(2, 4)).shape == (2, 7)


UNREADABLE = {
    r"reads inputs \[2, 5, 16\], expected one row a sample": (
        lambda net, x: plain(net, x)[:, -1],
        torch.zeros(2, 5, 6),
    ),
    "ran 2 times in one pass, expected once": (
        lambda net, x: plain(net, x) + plain(net, -x),
        torch.zeros(1, 6),
    ),
}


@pytest.mark.parametrize("message", UNREADABLE)
def test_a_head_without_one_input_a_sample_is_refused(message):
    of, inputs = UNREADABLE[message]
    with pytest.raises(HeadError, match=message):
        features_and_logits(Network(of), inputs)


RIGHT = {
    "linear": Network,
    "no bias": lambda: Network(head=nn.Linear(16, 5, bias=False)),
    "one beside, told": lambda: Network(beside=nn.Linear(16, 5), told="head"),
}
WRONG = {
    "temperature": lambda: Network(lambda net, x: plain(net, x) / 2),
    "cosine": lambda: Network(lambda net, x: 8 * plain(net, x), Cosine(16, 5, bias=False)),
    "one beside": lambda: Network(beside=nn.Linear(16, 5)),
    "one beside of another width": lambda: Network(beside=nn.Linear(16, 4)),
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def made(build, dtype=torch.float32):
    """Return a network and some inputs."""
    torch.manual_seed(0)
    return build().to(dtype), torch.randn(7, 6).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RIGHT)
def test_features_are_the_head_s_input_and_logits_what_it_makes_of_it(case, dtype):
    network, inputs = made(RIGHT[case], dtype)
    features, logits = features_and_logits(network, inputs)
    torch.testing.assert_close(features, network.body(inputs))
    torch.testing.assert_close(logits, network(inputs))
    check_head(network, features, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", WRONG)
def test_logits_that_are_not_are_refused(case, dtype):
    network, inputs = made(WRONG[case], dtype)
    head = re.escape(f"the logits of Network are not its head '{head_name(network)}' of its input")
    with pytest.raises(HeadError, match=rf"{head} .*difference.*'head_name', or leave"):
        check_head(network, *features_and_logits(network, inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_passes_where_large_terms_cancel(dtype):
    """The tolerance is in the size of the sum's terms: here a thousand times that of the logits."""
    torch.manual_seed(0)
    head = nn.Linear(64, 5, dtype=dtype)
    with torch.no_grad():
        head.weight[:, 32:] = -head.weight[:, :32]
    half = 1000 * torch.randn(50, 32)
    inputs = torch.cat([half, half + torch.randn(50, 32)], 1).to(dtype)
    logits = head(inputs)
    check_head(head, inputs, logits)
    with pytest.raises(HeadError, match="difference"):
        check_head(head, inputs, logits + 300)


def test_logits_of_autocast_pass_and_wrong_ones_do_not():
    network, inputs = made(Network)
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = features_and_logits(network, inputs)
    check_head(network, features, logits)
    with pytest.raises(HeadError, match="difference"):
        check_head(network, features, logits / 1.2)


def test_logits_of_medium_precision_pass_where_it_is_set():
    network, inputs = made(Network)
    features, logits = features_and_logits(network, inputs)
    rounded = logits.bfloat16().float() + 0.01 * logits
    with pytest.raises(HeadError, match="difference"):
        check_head(network, features, rounded)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        check_head(network, features, rounded)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_head_s_state_is_padded_with_the_mean_of_its_rows():
    own = torch.tensor([[7.0, 8.0, 9.0], [9.0, 6.0, 10.0]])
    state = {"fc.weight": own, "fc.bias": torch.tensor([1.0, 2.0]), "body": torch.ones(4)}
    padded = padded_state(state, "fc", 3, mean=True)
    assert padded["fc.weight"].tolist() == [*own.tolist(), [8.0, 7.0, 9.5]]
    assert padded["fc.bias"].tolist() == [1.0, 2.0, 1.5]
    assert padded["body"] is state["body"]
    assert padded_state(state, "fc", 2) is state


@pytest.mark.parametrize("outputs", [2, 5])
def test_a_head_of_other_outputs_has_the_first_rows_of_its_own_and_then_zeros(outputs):
    network = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).requires_grad_(False)
    padded = pad_head(network, outputs)
    x = torch.randn(6, 4)
    expected = F.pad(network(x), (0, outputs - 3))
    torch.testing.assert_close(padded(x), expected)
    state = dict(padded_state(network.state_dict(), "1", outputs))
    torch.testing.assert_close(state, dict(padded.state_dict()), rtol=0, atol=0)
    assert padded[0].weight is network[0].weight
    assert not padded[1].weight.requires_grad
    assert pad_head(network, 3) is network
