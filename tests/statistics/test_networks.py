"""Networks that are no stack of layers: whatever they do with their parameters, the Fisher is autograd's."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, Headed, Net, assert_exact, random, ready
from torch import nn

from coin.statistics import fisher_sums

PARTS = {  # what a network's call may use
    "layer": lambda: nn.Linear(4, 4),
    "other": lambda: nn.Linear(4, 4),
    "gate": lambda: nn.Linear(4, 2, bias=False),
    "norm": lambda: nn.LayerNorm(4),
    "normed": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "embed": lambda: nn.Embedding(CLASSES, 4),
    "padded": lambda: nn.Embedding(CLASSES, 4, padding_idx=-2),
    "sparse": lambda: nn.Embedding(CLASSES, 4, sparse=True),
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    "conv": lambda: nn.Conv2d(4, 4, 3),
    "batch_norm": lambda: nn.BatchNorm2d(4),
    "weight": lambda: random(4, 4),
    "scale": lambda: random(4),
    "shift": lambda: random(4),
    "token": lambda: random(1, 1, 4),
    "empty": lambda: random(4, 0),
}
TOKENS = torch.tensor([[0, 1, 1, 2, 0], [2, 2, 2, 2, 1], [0, 1, 2, 1, 2]])
CASES = {}


def build(call, inputs, parts, frozen=None):
    """A network of these parts with a head behind its call, and inputs, or random ones of a shape."""
    network = Headed(call, **{name: PARTS[name]() for name in parts})
    for parameter in network.parameters():
        if not isinstance(parameter, nn.UninitializedParameter) and not parameter.any():
            nn.init.normal_(parameter)  # a bias of zero would hide errors
    if frozen is not None:
        network.get_parameter(frozen).requires_grad_(False)
    if not isinstance(inputs, torch.Tensor):
        inputs = torch.randn(inputs)
    return network, inputs


def case(inputs, *parts, **options):
    """Enter a call of a network into the table, under its name in words."""

    def enter(call):
        name = call.__name__.replace("_", " ")
        CASES[name] = partial(build, call, inputs, parts, **options)
        return call

    return enter


# Calls in unusual forms, and parameters without a rule.


@case(torch.tensor([[0, 0.5, 1, 2, 3], [2, 1, 0.1, 3, 1], [1, 0, 1, 0, 0.2]]), "embed", "layer")
def a_table_of_which_a_column_is_read_as_integers(net, x):
    embedded = net.embed(x[:, 0].long())
    return torch.tanh(embedded + net.layer(x[:, 1:]))


@case((4, 3, 4), "scale", "shift", "token", "weight")
def calls_with_keywords(net, x):
    scaled = torch.mul(input=x, other=net.scale)
    shifted = torch.add(input=scaled, other=net.shift)
    token = net.token.expand(size=(len(x), -1, -1))
    rows = torch.cat([token, shifted], 1)
    return F.linear(weight=net.weight, bias=net.shift, input=rows.tanh())


@case((4, 4), "shift", "scale", "weight")
def calls_with_options_that_no_rule_knows(net, x):
    shifted = torch.add(x, net.shift, alpha=2, out=None)
    return torch.addmm(net.scale, shifted, net.weight, beta=2, alpha=3)


@case((4, 4), "weight", "shift")
def a_view_of_a_weight(net, x):
    return F.linear(x, net.weight.T, net.shift)


@case((4, 4), "normed")
def a_weight_that_is_made_of_parameters(net, x):
    return net.normed(x).tanh()


@case((3, 4), "scale", "shift")
def a_product_of_parameters(net, x):
    return x * (net.scale * net.shift)


@case((5, 4), "scale")
def a_power(net, x):
    return x.abs() ** net.scale


@case((3, 4), "empty")
def a_parameter_without_entries(net, x):
    return torch.cat([x, x @ net.empty], 1)


@case((3, 4), "layer", "shift", frozen="layer.weight")
def unused_and_frozen_parameters(net, x):
    return net.layer(x).tanh()


@case((3, 4), "layer")
def parts_without_gradient(net, x):
    with torch.no_grad():
        made = net.layer(x)
    return made.relu()


def turned(x):
    """Rotary positions, that queries and keys are multiplied with."""
    angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1]))
    turns = torch.polar(torch.ones(5, 2), angles)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(2)


@case((3, 5, 4), "layer", "other")
def complex_numbers(net, x):
    scores = turned(net.layer(x)) @ turned(net.other(x)).mT
    return scores.softmax(-1) @ x


# Parameters that are used more than once.


@case((4, 4), "layer", "norm")
def modules_called_twice(net, x):
    once = net.norm(net.layer(x)).tanh()
    return net.norm(net.layer(once)).tanh()


@case((4, 4), "layer", "norm")
def parameters_used_outside_of_their_module(net, x):
    made = net.norm(net.layer(x)).tanh()
    return made + x @ net.layer.weight.T + net.norm.bias.sin()


@case(TOKENS, "embed", "layer")
def a_tied_head_of_positions(net, tokens):
    made = net.layer(net.embed(tokens)).tanh()
    return F.linear(made, net.embed.weight)


@case(TOKENS, "embed", "layer")
def a_tied_head(net, tokens):
    made = net.layer(net.embed(tokens)).tanh()
    return F.linear(made.mean(1), net.embed.weight)


# Tokens.


@case(TOKENS, "embed")
def tokens(net, tokens):
    return net.embed(tokens).tanh()


@case(TOKENS, "padded")
def tokens_with_padding(net, tokens):
    return net.padded(tokens).tanh()


@case(TOKENS, "sparse")
def tokens_whose_gradient_is_sparse(net, tokens):
    return net.sparse(tokens).tanh()


@case(TOKENS[:, None].expand(3, 2, 5), "embed")
def tokens_in_several_rows(net, tokens):
    embedded = net.embed(tokens.flatten(0, 1))
    return embedded.tanh().view(len(tokens), -1)


# Orders of rows.


def samples_first(layer, x):
    return layer(x)


def samples_first_and_flat(layer, x):
    return layer(x.reshape(-1, 4)).view(len(x), -1, 4)


def positions_first(layer, x):
    return layer(x.transpose(0, 1)).transpose(0, 1)


def positions_first_and_flat(layer, x):
    rows = x.transpose(0, 1).reshape(-1, 4)
    return layer(rows).view(-1, len(x), 4).transpose(0, 1)


def in_order(order, net, x):  # [B, 3, 4]
    token = net.token.expand(len(x), -1, -1)
    rows = torch.cat([token, x * net.scale + net.shift], 1)
    return order(net.layer, rows).tanh()


for order in (samples_first, samples_first_and_flat, positions_first, positions_first_and_flat):
    for samples in (1, 2, 4, 5):  # a sample has four positions
        parts = ("token", "scale", "shift", "layer")
        made = partial(build, partial(in_order, order), (samples, 3, 4), parts)
        CASES[f"{order.__name__}, {samples}"] = made


def mixture(net, x):  # [B, T, 4]
    """Every token goes, by its first entry, to one of two experts."""
    rows = x.flatten(0, 1)
    mixed = torch.zeros_like(rows)
    for index, expert in enumerate([net.layer, net.other]):
        (places,) = torch.where(rows[:, 0].long() == index)
        mixed = mixed.index_add(0, places, expert(rows[places]).tanh())
    return mixed.view(len(x), -1)


def routed(routes):
    chosen = torch.tensor(routes)
    x = torch.randn(*chosen.shape, 4)
    x[..., 0] = chosen + 0.5
    return build(mixture, x, ("layer", "other"))


ROUTES = {  # the choices of each sample's tokens
    "one a sample": [[0], [1], [0], [1]],
    "one that some samples do not choose": [[0, 1], [1, 0], [1, 1], [0, 0]],
    "one that nobody chooses": [[0, 0], [0, 0], [0, 0]],
    "as many rows as if they were spread evenly": [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [0, 0, 0, 1],
        [0, 1, 1, 1],
    ],
    "as many, in other places": [[0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 1, 1], [1, 0, 1, 0]],
    "every sample's tokens alike": [[0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 1, 1]],
}
for name, routes in ROUTES.items():
    CASES[f"two experts, {name}"] = partial(routed, routes)


def one_hot(gates):
    return F.one_hot(gates.argmax(-1), 2).to(gates)


def the_largest(gates):
    return (gates == gates.amax(-1, keepdim=True)).to(gates)


def rounded(gates):
    return gates.softmax(-1).round()


def by_sign(gates):
    sign = gates[:, 0].sign()
    return torch.stack([sign + 1, 1 - sign], 1) / 2


def dispatch(choose, net, x):  # [B, T, 4]
    """Tokens are sent to the expert that a gate prefers, by products with a one-hot choice: nothing is indexed."""
    rows = x.flatten(0, 1)
    chosen = choose(net.gate(rows))  # [B·T, 2]
    place = chosen * chosen.cumsum(0) - 1  # where a row stands in its expert's queue
    slots = (place[..., None] == torch.arange(len(rows))).to(rows)  # [B·T, 2, slots]
    sent = torch.einsum("res,rd->esd", slots, rows)
    made = torch.stack([net.layer(sent[0]), net.other(sent[1])])
    return torch.einsum("res,esd->rd", slots, made.tanh()).view(len(x), -1)


def dispatched(choose, seed):
    torch.manual_seed(seed)
    return build(partial(dispatch, choose), (5, 3, 4), ("gate", "layer", "other"))


for choose in (one_hot, the_largest, rounded, by_sign):
    for seed in range(
        4
    ):  # one in four was 20 % off: two copies of a sample said where all others' rows lie
        CASES[f"dispatched, {choose.__name__}, {seed}"] = partial(dispatched, choose, seed)


def by_mask(x, numbers):
    return x[torch.arange(5) < numbers[:, None]]


def by_cutting(x, numbers):
    return torch.cat([own[:number] for own, number in zip(x, numbers, strict=True)])


def by_repeating(x, numbers):
    return torch.repeat_interleave(x[:, 0], numbers, 0)


def of_unequal_numbers(pick, net, x):
    """Two copies of the first sample told nothing of the others: 27 to 39 % off."""
    numbers = x[:, 0, 0].long()
    rows = net.layer(pick(x, numbers)).tanh()
    return torch.stack([own.mean(0) for own in rows.split(numbers.tolist())])


NUMBERS = torch.tensor([3.0, 2, 4])[:, None, None] + torch.linspace(0, 0.5, 20).view(1, 5, 4)
for pick in (by_mask, by_cutting, by_repeating):
    CASES[f"rows, {pick.__name__}"] = partial(
        build, partial(of_unequal_numbers, pick), NUMBERS, ["layer"]
    )


# Weights of zero, which hide the layers in front of them.


def hidden(zero):
    def call(net, x):
        return net.last(x + net.inner(x).tanh() * net.scale)

    network = Net(call, inner=nn.Linear(4, 4), scale=random(4), last=nn.Linear(4, CLASSES))
    nn.init.zeros_(network.get_parameter(zero))
    return network, torch.randn(4, 4)


CASES["a new head"] = partial(hidden, "last.weight")
CASES["a new branch"] = partial(hidden, "scale")


def hidden_by_a_normalisation():
    """Its zeros replaced by ones, the head gave a gradient that the normalisation cancels, but for rounding."""
    first = nn.Linear(4, 8)
    first.weight.data[:] = torch.tensor([1.0, -1] * 4)[:, None]
    nn.init.zeros_(first.bias)
    last = nn.Linear(8, CLASSES)
    nn.init.zeros_(last.weight)
    network = nn.Sequential(first, nn.LayerNorm(8, elementwise_affine=False), last)
    return network, torch.tensor([[1.0, 0, 0, 0]] * 3)


CASES["a new head behind a normalisation"] = hidden_by_a_normalisation


# Changes in place, and orders in memory.


@case((4, 4), "layer", "shift")
def an_input_that_is_changed_when_a_shift_has_read_it(net, x):
    made = net.layer(x)
    shifted = made + net.shift
    made.mul_(2)
    return shifted.tanh() + made


@case((4, 4), "layer", "other", frozen="other.weight")
def an_input_that_is_changed_when_a_frozen_layer_has_read_it(net, x):
    made = net.layer(x)
    mapped = net.other(made)
    made.mul_(2)
    return mapped.tanh() + made


@case((3, 2, 4), "token")
def an_expanded_token_that_is_changed(net, x):
    token = net.token.expand(len(x), 2, -1)
    # Only what is no view of the parameter could be written to.
    return token + x if token._is_view() else token.add_(x)


@case((3, 4, 5, 5), "conv", "batch_norm")
def functions_in_place(net, x):
    made = net.conv(x).relu_()
    return F.hardswish(net.batch_norm(made), inplace=True)


@case((1, 4, 5, 5), "conv")
def a_batch_norm_without_running_statistics(net, x):
    """It is right for single samples alone."""
    return F.batch_norm(net.conv(x), None, None, training=True).tanh()


@case((5, 4, 5, 5), "conv")
def a_backward_pass_that_cannot_be_batched_with_channels_last(net, x):
    return F.group_norm(net.conv(x), 2).mean((2, 3))


@case((3, 4, 5, 5), "conv", "batch_norm")
def views_that_hold_in_the_usual_order_of_memory_alone(net, x):
    return net.batch_norm(net.conv(x)).view(len(x), -1)


class Square(torch.autograd.Function):
    """The square, whose backward pass reads values."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.detach().numpy() * gradient.numpy())


@case((6, 4), "layer")
def a_backward_pass_that_cannot_be_batched(net, x):
    return Square.apply(net.layer(x))


# Attention.

CAUSAL = torch.ones(5, 5).triu(1).bool()
SUMMED = torch.zeros(5, 5).double().masked_fill(CAUSAL, -torch.inf)
BY_HEAD = torch.stack([CAUSAL, CAUSAL.T])
BIAS = torch.arange(50.0).double().sin().view(2, 5, 5)  # by heads
PADDED = {"key_padding_mask": torch.tensor([[False, True, False, False, True]])}
ALONE = {"need_weights": False}


def attend(options, net, x):  # [B, 5, 4]
    given = dict(options)
    if "key_padding_mask" in given:
        given["key_padding_mask"] = given["key_padding_mask"].expand(len(x), -1)
    if given.get("attn_mask") is not None and given["attn_mask"].ndim == 3:
        given["attn_mask"] = given["attn_mask"].repeat(len(x), 1, 1)
    mixed, weights = net.attention(x, x, x, **given)
    return mixed if weights is None else torch.cat([mixed, weights], 2)


ATTENTION = {
    "attention": {},
    "attention without weights": ALONE,
    "attention to what is there": PADDED,
    "causal attention": {"attn_mask": CAUSAL, "is_causal": True},
    "causal attention by a sum": {"attn_mask": SUMMED} | ALONE,
    "causal attention to what is there": {"attn_mask": CAUSAL} | PADDED,
    "biased attention to what is there": {"attn_mask": BIAS[0]} | PADDED,
    "attention masked by heads": {"attn_mask": BY_HEAD} | PADDED | ALONE,
    "attention biased by heads": {"attn_mask": BIAS},
}
for name, options in ATTENTION.items():
    CASES[name] = partial(build, partial(attend, options), (4, 5, 4), ["attention"])


@case((3, 5, 4), "attention")
def other_tokens(net, x):
    return torch.cat(net.attention(x, x.tanh(), x.tanh()), 2)


LEFT = torch.tensor([[True, True, False, False, False], [True] * 5, [False] * 5])


@case(torch.cat([torch.linspace(-1, 1, 60).view(3, 5, 4).sin(), LEFT[..., None]], 2), "attention")
def padding_on_the_left(net, x):
    """Its rows see nothing: they are zeros, as torch has them."""
    rows = x[..., :4]
    masks = {"attn_mask": CAUSAL, "key_padding_mask": x[..., 4] > 0}
    mixed, _ = net.attention(rows, rows, rows, need_weights=False, **masks)
    return mixed[:, -1]


WITHOUT_FISHER = {
    "a parameter without entries": {"empty"},
    "unused and frozen parameters": {"shift"},
    "parts without gradient": {"layer.weight", "layer.bias"},
    "two experts, one that nobody chooses": {"other.weight", "other.bias"},
    "a new head": {"inner.weight", "inner.bias", "scale"},
    "a new branch": {"inner.weight", "inner.bias"},
    "a new head behind a normalisation": {"0.weight", "0.bias"},
}
WITHOUT_FISHER |= {name: {"gate.weight"} for name in CASES if name.startswith("dispatched")}


def made_of(name):
    torch.manual_seed(0)
    return ready(*CASES[name]())


@pytest.mark.parametrize("name", CASES)
def test_fisher(name):
    network, inputs = made_of(name)
    assert_exact(network, inputs, WITHOUT_FISHER.get(name, set()))


RULED = [
    "tokens",
    "tokens with padding",
    "a new head",
    "a new branch",
    "a new head behind a normalisation",
]


@pytest.mark.parametrize("name", [*RULED, *ATTENTION])
def test_rules_hold_for_all_parameters(name):
    """Others are counted one sample and output after the other, which costs as much again."""
    network, inputs = made_of(name)
    assert fisher_sums(network, [inputs]).passes == len(inputs) * (1 + 2 * CLASSES)
