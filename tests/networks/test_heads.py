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
    assert head_name(BaseModel()) == "layer"


class Alias(nn.Module):
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


def test_the_head_is_the_last_linear_or_named():
    assert head_name(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 4), nn.Dropout()))) == "2.0"
    assert head_name(Named()) == "answer"
    with pytest.raises(HeadError, match=r"no Linear layer in Sequential; name the head by an attribute 'head_name'"):
        head_name(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()))
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


def test_features_are_the_heads_input_which_has_no_positions():
    named = Named()
    inputs = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(features_and_logits(named, inputs)[0], inputs)
    assert not named.answer._forward_pre_hooks
    with pytest.raises(HeadError, match=r"the head of Network reads inputs \[2, 5, 16\], expected one row a sample"):
        features_and_logits(Network(lambda n, x: n.head(n.body(x))[:, -1]), torch.zeros(2, 5, 6))
    with pytest.raises(StateError, match="ran 2 times in one pass, expected once"):
        features_and_logits(Network(lambda n, x: n.head(n.body(x)) + n.head(n.body(-x))), torch.zeros(1, 6))


# The check


class Network(nn.Module):
    def __init__(self, forward, head=None, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.head = nn.Linear(16, 5, bias=bias) if head is None else head
        self.of = forward

    def forward(self, x):
        return self.of(self, x)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


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


ROWS = (7, 6)
PLAIN = {
    "linear": lambda: Network(lambda n, x: n.head(n.body(x))),
    "no bias": lambda: Network(lambda n, x: n.head(n.body(x)), bias=False),
    "auxiliary, told": lambda: told(with_auxiliary_head(), "head"),
}
OTHERS = {
    "temperature": lambda: Network(lambda n, x: n.head(n.body(x)) / 2),
    "softmax": lambda: Network(lambda n, x: n.head(n.body(x)).softmax(1)),
    "residual": lambda: Network(lambda n, x: n.head(n.body(x)) + x[:, :5]),
    "cosine": lambda: Network(lambda n, x: 8 * n.head(n.body(x)), Cosine(16, 5, bias=False)),
    "auxiliary": with_auxiliary_head,
    "auxiliary of another width": lambda: with_auxiliary_head(classes=4),
}


def made(build, dtype=torch.float32):
    torch.manual_seed(0)
    network = build().to(dtype).eval()
    with torch.no_grad():
        return network, *features_and_logits(network, torch.randn(ROWS).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN)
def test_logits_that_are_the_head_of_its_input_pass(name, dtype):
    check_head(*made(PLAIN[name], dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OTHERS)
def test_logits_that_are_not_are_refused(name, dtype):
    network, features, logits = made(OTHERS[name], dtype)
    found = re.escape(f"the logits of {type(network).__name__} are not its head '{head_name(network)}'")
    with pytest.raises(HeadError, match=rf"{found} of .*difference.*attribute 'head_name', or leave"):
        check_head(network, features, logits)


def test_a_head_of_another_kind_is_refused():
    network = told(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), "1")
    for use in (
        lambda: check_head(network, *features_and_logits(network, torch.randn(ROWS))),
        lambda: replace_head(network, 3),
    ):
        with pytest.raises(HeadError, match="found a head '1' of type Tanh in Sequential, expected a Linear layer"):
            use()


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


def test_logits_of_autocast_or_of_medium_precision_pass_and_wrong_ones_do_not():
    network, *_ = made(PLAIN["linear"])
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = features_and_logits(network, torch.randn(ROWS))
    assert logits.dtype is torch.bfloat16
    check_head(network, features, logits)
    with pytest.raises(StateError, match="difference"):
        check_head(network, features, logits / 1.2)
    network, features, logits = made(PLAIN["linear"])
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


def test_a_head_s_state_has_zero_rows_or_the_mean_of_its_own():
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.tensor([1.0, 2.0]), "body": torch.ones(4)}
    padded = padded_state(state, "fc", 4)
    assert torch.equal(padded["fc.weight"], torch.cat([torch.ones(2, 3), torch.zeros(2, 3)]))
    assert padded["fc.bias"].tolist() == [1.0, 2.0, 0.0, 0.0]
    assert padded["body"] is state["body"]
    state["fc.weight"] = torch.tensor([[7.0, 8.0, 9.0], [9.0, 6.0, 10.0]])
    filled = padded_state(state, "fc", 3, mean=True)
    assert filled["fc.weight"][2].tolist() == [8.0, 7.0, 9.5]
    assert filled["fc.bias"].tolist() == [1.0, 2.0, 1.5]
    assert state["fc.weight"].shape == (2, 3)
    assert padded_state(state, "fc", 2) is state


def test_a_head_of_other_outputs_has_the_first_rows_of_its_own_and_then_zeros():
    network = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).requires_grad_(False)
    assert pad_head(network, 3) is network
    for outputs in (2, 5):
        made = pad_head(network, outputs)
        assert made[0].weight is network[0].weight
        assert made[1].out_features == outputs
        assert not made[1].weight.requires_grad
        x, expected = torch.randn(6, 4), torch.zeros(6, outputs)
        rows = min(3, outputs)
        expected[:, :rows] = network(x)[:, :rows]
        torch.testing.assert_close(made(x), expected)
    assert network[1].weight.shape == (3, 5)
