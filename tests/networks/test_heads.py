import re
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import coin
from coin.errors import StateError
from coin.networks import check_head, features_and_logits, head_name
from coin.networks.heads import padded_rows, replace_head


class Named(nn.Module):
    """Its head is not the last Linear, so it says which it is."""

    head_name = "answer"

    def __init__(self):
        super().__init__()
        self.answer = nn.Linear(4, 3)
        self.unused = nn.Linear(9, 9)

    def forward(self, x):
        return self.answer(x)


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
        self.score, self.encoder = nn.Linear(2, 3), BaseModel()


def test_a_head_is_outside_of_every_base_model_at_any_depth():
    whole = ForClassification()
    assert head_name(whole) == "score"
    assert head_name(nn.ModuleDict({"model": whole})) == "model.score"
    assert head_name(nn.ModuleDict({"a": nn.ModuleDict({"model": whole}), "norm": nn.LayerNorm(3)})) == "a.model.score"
    assert head_name(nn.ModuleDict({"fc": nn.Linear(2, 3), "body": BaseModel()})) == "fc"
    assert head_name(BaseModel()) == "layer"


class Alias(nn.Module):
    """Its layers have two names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.classifier = self.layers[2]
        self.network = self.layers

    def forward(self, x):
        return self.classifier(self.layers[:2](x))


def test_a_layer_with_several_names_is_called_as_its_parameters_are(tmp_path):
    """The head had adapters, and a loaded system refused them."""
    network, inputs = Alias(), torch.randn(30, 4)
    assert head_name(network) == "layers.2"
    experts = [deepcopy(network) for _ in range(2)]
    for expert in experts:
        nn.init.normal_(expert.classifier.weight)
    adapted = coin.fit_adapters(network, experts, [[inputs], [inputs]], rank=1)
    assert not any(name.startswith("layers.2.") for name in adapted.adapters[0].changes)
    system = coin.Coded([[0.5, 0.5]], experts, [adapted]).fit_decoder([inputs], [0], "expert_head")
    system.save(tmp_path / "system")
    again = coin.Coded.load(tmp_path / "system", experts)
    assert torch.equal(again.decode(inputs), system.decode(inputs))
    replace_head(network, 7)
    assert network(inputs).shape == (30, 7)


def test_the_head_is_the_last_linear_or_named_or_the_last_convolution():
    assert head_name(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 4), nn.Dropout()))) == "2.0"
    assert head_name(Named()) == "answer"
    assert head_name(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Flatten())) == "1"
    with pytest.raises(StateError, match=r"no Linear or Conv2d layer in Sequential.*attribute 'head_name'"):
        head_name(nn.Sequential(nn.BatchNorm2d(3)))
    named = Named()
    named.head_name = "anser"
    with pytest.raises(StateError, match="found head_name 'anser', expected a layer of Named"):
        head_name(named)


@pytest.mark.parametrize("bias", [True, False])
def test_a_replaced_head_keeps_its_place_inputs_and_bias(bias):
    linear = nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 1000, bias=bias)))
    replace_head(linear, 3)
    assert linear(torch.zeros(2, 5)).shape == (2, 3)
    assert (linear[1][1].bias is not None) == bias
    convolution = nn.Sequential(nn.Conv2d(3, 10, 1, bias=bias), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    replace_head(convolution, 4)
    assert convolution(torch.zeros(2, 3, 6, 6)).shape == (2, 4)
    assert (convolution[0].bias is not None) == bias


def test_features_are_the_heads_input_averaged_over_positions():
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 6, 6, generator=draw)
    network = Network(lambda n, x: n.head(n.body(x)).mean(1))
    torch.testing.assert_close(features_and_logits(network, tokens)[0], network.body(tokens).mean(1))
    images = torch.randn(2, 3, 5, 7, generator=draw)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    features, _ = features_and_logits(convolution, images)
    torch.testing.assert_close(features, images.mean((2, 3)))
    named = Named()
    inputs = torch.randn(2, 4, generator=draw)
    assert torch.equal(features_and_logits(named, inputs)[0], inputs)
    assert not named.answer._forward_pre_hooks


def test_a_head_that_runs_twice_has_no_features():
    class Twice(Named):
        def forward(self, x):
            return self.answer(x) + self.answer(-x)

    with pytest.raises(StateError, match="ran 2 times in one pass, expected once"):
        features_and_logits(Twice(), torch.zeros(1, 4))


# The check


class Network(nn.Module):
    """A body, a head, and what is made of them."""

    def __init__(self, forward, head=None, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.head = nn.Linear(16, 5, bias=bias) if head is None else head
        self.of = forward

    def forward(self, x):
        return self.of(self, x)


class Cosine(nn.Linear):
    """A Linear by its type alone."""

    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Maps(nn.Module):
    """A convolution as the head, and what is made of its outputs ``[B, C, H, W]``."""

    def __init__(self, of, **options):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.head = nn.Conv2d(8, 5, **options)
        self.of = of

    def forward(self, x):
        return self.of(self.head(self.body(x)))


def with_auxiliary_head(classes=5):
    """Its last registered Linear runs, and is not the one that gives the logits."""

    def forward(network, x):
        features = network.body(x)
        network.latest = network.auxiliary(features)
        return network.head(features)

    network = Network(forward)
    network.auxiliary = nn.Linear(16, classes)
    return network


def told(network, name):
    network.head_name = name
    return network


ROWS, TOKENS, IMAGES = (7, 6), (7, 9, 6), (7, 3, 8, 8)
PLAIN = {
    "linear": (lambda: Network(lambda n, x: n.head(n.body(x))), ROWS),
    "no bias": (lambda: Network(lambda n, x: n.head(n.body(x)), bias=False), ROWS),
    "auxiliary, told": (lambda: told(with_auxiliary_head(), "head"), ROWS),
    "every token": (lambda: Network(lambda n, x: n.head(n.body(x)).mean(1)), TOKENS),
    "the first token": (lambda: Network(lambda n, x: n.head(n.body(x))[:, 0]), TOKENS),
    "convolution": (lambda: Maps(lambda y: y.mean((2, 3)), kernel_size=1), IMAGES),
}
OTHERS = {
    "temperature": (lambda: Network(lambda n, x: n.head(n.body(x)) / 2), ROWS),
    "softmax": (lambda: Network(lambda n, x: n.head(n.body(x)).softmax(1)), ROWS),
    "residual": (lambda: Network(lambda n, x: n.head(n.body(x)) + x[:, :5]), ROWS),
    "cosine": (lambda: Network(lambda n, x: 8 * n.head(n.body(x)), Cosine(16, 5, bias=False)), ROWS),
    "auxiliary": (with_auxiliary_head, ROWS),
    "every token, then a nonlinearity": (lambda: Network(lambda n, x: n.head(n.body(x)).relu().mean(1)), TOKENS),
    "convolution, then a nonlinearity": (lambda: Maps(lambda y: y.relu().mean((2, 3)), kernel_size=1), IMAGES),
    "padded convolution": (lambda: Maps(lambda y: y.mean((2, 3)), kernel_size=1, padding=1), IMAGES),
}


def made(build, shape, dtype=torch.float32):
    torch.manual_seed(0)
    network = build().to(dtype).eval()
    with torch.no_grad():
        return network, *features_and_logits(network, torch.randn(shape).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN)
def test_logits_that_are_the_head_of_its_input_pass(name, dtype):
    check_head(*made(*PLAIN[name], dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OTHERS)
def test_logits_that_are_not_are_refused(name, dtype):
    network, features, logits = made(*OTHERS[name], dtype)
    found = re.escape(f"the logits of {type(network).__name__} are not its head '{head_name(network)}'")
    kind = type(network.get_submodule(head_name(network))).__name__
    with pytest.raises(StateError, match=rf"{found} \({kind}\) of .*difference.*attribute 'head_name', or leave"):
        check_head(network, features, logits)


def test_logits_of_another_shape_are_refused():
    wide = (lambda: Maps(lambda y: y.mean((2, 3)), kernel_size=3), IMAGES)
    for build, shape in ((lambda: with_auxiliary_head(classes=4), ROWS), wide):
        with pytest.raises(StateError, match=r"found logits \[7, \d\] and inputs \[7, \d+\] for"):
            check_head(*made(build, shape))


def test_a_head_of_another_kind_is_refused():
    network = told(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), "1")
    with pytest.raises(StateError, match=r"not its head '1' \(Tanh\) of its input; name the layer"):
        check_head(network, *features_and_logits(network, torch.randn(ROWS)))
    with pytest.raises(StateError, match="the head '1' is a Tanh, expected a Linear or a Conv2d"):
        replace_head(network, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_passes_where_large_terms_cancel(dtype):
    """The tolerance is in the size of the sum's terms: here a thousand times that of the logits."""
    torch.manual_seed(0)
    head = nn.Linear(64, 5, dtype=dtype)
    with torch.no_grad():
        head.weight[:, 32:] = -head.weight[:, :32]
    half = 1000 * torch.randn(50, 32)
    inputs = torch.cat([half, half + torch.randn(50, 32)], 1).to(dtype)
    check_head(head, *features_and_logits(head, inputs))
    with pytest.raises(StateError, match="difference"):
        check_head(head, inputs, head(inputs) + 300)


def test_logits_that_autocast_computed_pass_and_wrong_ones_do_not():
    network, *_ = made(*PLAIN["linear"])
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = features_and_logits(network, torch.randn(ROWS))
    assert logits.dtype is torch.bfloat16
    check_head(network, features, logits)
    with pytest.raises(StateError, match="difference"):
        check_head(network, features, logits / 1.2)


def test_float32_products_of_medium_precision_pass():
    network, features, logits = made(*PLAIN["linear"])
    rounded = logits.bfloat16().float()
    with pytest.raises(StateError, match="difference"):
        check_head(network, features, rounded + 0.01 * logits)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        check_head(network, features, rounded + 0.01 * logits)
    finally:
        torch.set_float32_matmul_precision(before)


# Padding


def test_a_padded_head_has_zero_rows_or_the_mean_of_its_own():
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.tensor([1.0, 2.0]), "body": torch.ones(4)}
    padded = {**state, **padded_rows(state, "fc", 4)}
    assert torch.equal(padded["fc.weight"], torch.cat([torch.ones(2, 3), torch.zeros(2, 3)]))
    assert padded["fc.bias"].tolist() == [1.0, 2.0, 0.0, 0.0]
    assert padded["body"] is state["body"]
    state["fc.weight"] = torch.tensor([[7.0, 8.0, 9.0], [9.0, 6.0, 10.0]])
    filled = padded_rows(state, "fc", 3, mean=True)
    assert filled.keys() == {"fc.weight", "fc.bias"}
    assert filled["fc.weight"][2].tolist() == [8.0, 7.0, 9.5]
    assert filled["fc.bias"].tolist() == [1.0, 2.0, 1.5]
    assert state["fc.weight"].shape == (2, 3)
    assert padded_rows(state, "fc", 2) == {}
    with pytest.raises(StateError, match=r"'fc\.weight' has 2 outputs, expected at most 1"):
        padded_rows(state, "fc", 1)


def test_features_are_those_of_the_token_that_the_logits_are_read_at():
    """As in GPT-2, whose logits are those of each sequence's last token."""

    def last(network, x):
        return network.head(network.body(x))[torch.arange(len(x)), (x[..., 0] != 0).sum(1) - 1]

    torch.manual_seed(0)
    network, x = Network(last), torch.randn(5, 7, 6)
    x[2, 4:] = 0
    features, logits = features_and_logits(network, x)
    torch.testing.assert_close(features[[0, 2]], network.body(torch.stack([x[0, 6], x[2, 3]])))
    check_head(network, features, logits)


@pytest.mark.parametrize("tokens", [5, 7])
@pytest.mark.parametrize("read", [lambda y: y[-1], lambda y: y.mean(0)], ids=["last", "mean"])
def test_features_of_tokens_before_samples(read, tokens):
    """As many tokens as samples look like samples first: features were of other rows."""
    torch.manual_seed(0)
    network, x = Network(lambda n, x: read(n.head(n.body(x).transpose(0, 1)))), torch.randn(5, tokens, 6)
    features, logits = features_and_logits(network, x)
    torch.testing.assert_close(features, read(network.body(x).transpose(0, 1)))
    check_head(network, features, logits)
