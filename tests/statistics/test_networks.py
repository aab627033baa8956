"""Networks that are no stack of layers: whatever they do with their parameters, the Fisher is autograd's."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, Headed, Net, assert_exact, random, ready
from torch import nn

from coin.statistics import fisher_sums

CASES = {}


def case(make):
    """Enter what makes a network and inputs into the table, under its name in words."""
    CASES[make.__name__.replace("_", " ")] = make
    return make


# Calls in unusual forms, and parameters without a rule.


@case
def a_table_whose_columns_are_read_as_integers():
    def call(net, x):
        embedded = net.embed(x[:, 0].long())
        return torch.tanh(embedded + net.numbers(x[:, 1:]))

    column = torch.tensor([[0.0], [3], [1], [3], [2]])
    inputs = torch.cat([column, torch.randn(5, 2)], 1)
    return Headed(call, embed=nn.Embedding(4, 3), numbers=nn.Linear(2, 3)), inputs


@case
def calls_with_keywords():
    def call(net, x):
        scaled = torch.mul(input=x, other=net.scale)
        shifted = torch.add(input=scaled, other=net.shift)
        token = net.token.expand(size=(len(x), -1, -1))
        rows = torch.cat([token, shifted], 1)
        return F.linear(weight=net.weight, bias=net.shift, input=rows.tanh())

    parts = {"scale": random(4), "token": random(1, 1, 4), "weight": random(4, 4)}
    network = Headed(call, shift=random(4), **parts)
    return network, torch.randn(4, 3, 4)


@case
def calls_with_options_that_no_rule_knows():
    def call(net, x):
        shifted = torch.add(x, net.shift, alpha=2, out=None)
        return torch.addmm(net.bias, shifted, net.weight, beta=2, alpha=3)

    network = Headed(call, weight=random(4, 5), bias=random(5), shift=random(4))
    return network, torch.randn(4, 4)


@case
def a_view_of_a_weight():
    network = Headed(
        lambda net, x: F.linear(x, net.weight.T, net.bias), weight=random(4, 5), bias=random(5)
    )
    return network, torch.randn(4, 4)


@case
def a_weight_that_is_made_of_parameters():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    return Headed(lambda net, x: net.layer(x).tanh(), layer=layer), torch.randn(4, 4)


@case
def a_product_of_parameters():
    network = Headed(lambda net, x: x * (net.one * net.two), one=random(4), two=random(4))
    return network, torch.randn(3, 4)


@case
def a_power():
    return Headed(lambda net, x: x.abs() ** net.power, power=random(4)), torch.randn(5, 4)


@case
def a_parameter_without_entries():
    network = Headed(lambda net, x: torch.cat([x, x @ net.none], 1), none=random(4, 0))
    return network, torch.randn(3, 4)


@case
def unused_and_frozen_parameters():
    network = Headed(lambda net, x: net.layer(x).tanh(), layer=nn.Linear(4, 4), unused=random(2))
    network.layer.weight.requires_grad_(False)
    return network, torch.randn(3, 4)


@case
def a_complex_buffer():
    """Rotary positions, that queries and keys are multiplied with."""

    def rotated(net, x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * net.turns).flatten(2)

    def call(net, x):  # [B, 5, 4]
        scores = rotated(net, net.queries(x)) @ rotated(net, net.keys(x)).mT
        return scores.softmax(-1) @ x

    network = Headed(call, queries=nn.Linear(4, 4), keys=nn.Linear(4, 4, bias=False))
    network.register_buffer("turns", torch.polar(torch.ones(5, 2), torch.randn(5, 2)))
    return network, torch.randn(3, 5, 4)


# Parameters that are used more than once.


@case
def modules_called_twice():
    def call(net, x):
        once = net.norm(net.same(x)).tanh()
        return net.norm(net.same(once)).tanh()

    return Headed(call, same=nn.Linear(4, 4), norm=nn.LayerNorm(4)), torch.randn(4, 4)


@case
def parameters_used_outside_of_their_module():
    def call(net, x):
        made = net.norm(net.same(x)).tanh()
        return made + x @ net.same.weight.T + net.norm.bias.sin()

    return Headed(call, same=nn.Linear(4, 4), norm=nn.LayerNorm(4)), torch.randn(4, 4)


def tied(call):
    network = Net(call, embed=nn.Embedding(CLASSES, 4), mix=nn.Linear(4, 4))
    network.last = nn.Linear(4, CLASSES)
    network.last.weight = network.embed.weight
    return network, torch.randint(0, CLASSES, (4, 5))


@case
def a_tied_head():
    return tied(lambda net, tokens: net.last(net.mix(net.embed(tokens)).tanh().mean(1)))


@case
def a_tied_head_of_positions():
    return tied(lambda net, tokens: net.last(net.mix(net.embed(tokens)).tanh()).mean(1))


# Tokens.


def of_tokens(rows, **options):
    def call(net, tokens):
        embedded = net.embed(tokens.reshape(-1, 5))
        return embedded.tanh().reshape(len(tokens), -1)

    tokens = torch.tensor([[0, 1, 1, 2, 0], [2, 2, 2, 2, 1], [0, 1, 2, 1, 2]])
    network = Headed(call, embed=nn.Embedding(CLASSES, 4, **options))
    return network, tokens[:, None].expand(3, rows, 5)


CASES["tokens"] = partial(of_tokens, 1)
CASES["tokens in several rows"] = partial(of_tokens, 2)
CASES["tokens with padding"] = partial(of_tokens, 1, padding_idx=-2)
CASES["tokens whose gradient is sparse"] = partial(of_tokens, 1, sparse=True)


# Orders of rows.


def in_layout(apply, samples):
    def call(net, x):  # [B, 3, 4]
        token = net.token.expand(len(x), -1, -1)
        rows = torch.cat([token, x * net.scale + net.shift], 1)
        return apply(net.layer, rows).tanh()

    parts = {"token": random(1, 1, 4), "scale": random(4), "shift": random(3, 1)}
    return Headed(call, layer=nn.Linear(4, 4), **parts), torch.randn(samples, 3, 4)


def positions_first_and_flat(layer, x):
    rows = x.transpose(0, 1).reshape(-1, 4)
    return layer(rows).view(-1, len(x), 4).transpose(0, 1)


LAYOUTS = {
    "samples first": lambda layer, x: layer(x),
    "samples first and flat": lambda layer, x: layer(x.reshape(-1, 4)).view(len(x), -1, 4),
    "positions first": lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1),
    "positions first and flat": positions_first_and_flat,
}
for name, apply in LAYOUTS.items():
    for samples in (1, 2, 4, 5):  # a sample has four positions
        CASES[f"{name}, {samples}"] = partial(in_layout, apply, samples)


def mixture(number, routes):
    """Every token goes, by its first entry, to one of several experts."""

    def call(net, x):  # [B, T, 4]
        rows = x.flatten(0, 1)
        mixed = rows.new_zeros(len(rows), 5)
        for index, expert in enumerate(net.experts):
            (places,) = torch.where(rows[:, 0].long() == index)
            mixed = mixed.index_add(0, places, expert(rows[places]).tanh())
        return mixed.view(len(x), -1)

    chosen = torch.tensor(routes)
    x = torch.randn(*chosen.shape, 4)
    x[..., 0] = chosen + 0.5
    experts = [nn.Linear(4, 5) for _ in range(number)]
    return Headed(call, experts=nn.ModuleList(experts)), x


ROUTES = {  # the choices of each sample's tokens
    "one a sample": [[0], [1], [0], [1]],
    "one that some samples do not choose": [[0, 1], [1, 0], [1, 1], [0, 0]],
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
    CASES[f"two experts, {name}"] = partial(mixture, 2, routes)
    CASES[f"two experts and one that nobody chooses, {name}"] = partial(mixture, 3, routes)


def dispatched(choose, seed):
    """Tokens are sent to the expert that a gate prefers, by products with a one-hot choice: nothing is indexed."""

    def call(net, x):  # [B, T, 4]
        rows = x.flatten(0, 1)
        chosen = choose(net.gate(rows))  # [B·T, 2]
        place = chosen * chosen.cumsum(0) - 1  # where a row stands in its expert's queue
        slots = (place[..., None] == torch.arange(len(rows))).to(rows)  # [B·T, 2, slots]
        sent = torch.einsum("res,rd->esd", slots, rows)
        made = torch.stack([net.one(sent[0]), net.two(sent[1])])
        return torch.einsum("res,esd->rd", slots, made.tanh()).view(len(x), -1)

    torch.manual_seed(seed)
    parts = {"one": nn.Linear(4, 5), "two": nn.Linear(4, 5)}
    return Headed(call, gate=nn.Linear(4, 2, bias=False), **parts), torch.randn(5, 3, 4)


def by_sign(gates):
    sign = gates[:, 0].sign()
    return torch.stack([sign + 1, 1 - sign], 1) / 2


CHOICES = {
    "one hot": lambda gates: F.one_hot(gates.argmax(-1), 2).to(gates),
    "the largest": lambda gates: (gates == gates.amax(-1, keepdim=True)).to(gates),
    "a softmax rounded": lambda gates: gates.softmax(-1).round(),
    "a sign": by_sign,
}
for name, choose in CHOICES.items():
    for seed in range(
        4
    ):  # one in four was 20 % off: two copies of a sample said where all others' rows lie
        CASES[f"dispatched by {name}, {seed}"] = partial(dispatched, choose, seed)


def of_unequal_numbers(pick):
    """Two copies of the first sample told nothing of the others: 27 to 39 % off."""

    def call(net, x):
        numbers = x[:, 0, 0].long()
        rows = net.layer(pick(x, numbers)).tanh()
        return torch.stack([own.mean(0) for own in rows.split(numbers.tolist())])

    x = torch.randn(3, 5, 4)
    x[:, :, 0] = torch.tensor([3.0, 2, 4])[:, None]
    return Headed(call, layer=nn.Linear(4, 5)), x


def by_mask(x, numbers):
    return x[torch.arange(5) < numbers[:, None]]


def by_cutting(x, numbers):
    return torch.cat([own[:number] for own, number in zip(x, numbers, strict=True)])


CASES["rows picked by a mask"] = partial(of_unequal_numbers, by_mask)
CASES["rows cut"] = partial(of_unequal_numbers, by_cutting)


@case
def rows_repeated():
    return of_unequal_numbers(lambda x, numbers: torch.repeat_interleave(x[:, 0], numbers, 0))


# Weights of zero, which hide the layers in front of them.


def hidden(zero):
    def call(net, x):
        return net.last(x + net.inner(x).tanh() * net.scale)

    network = Net(call, inner=nn.Linear(4, 4), scale=random(4), last=nn.Linear(4, CLASSES))
    nn.init.zeros_(network.get_parameter(zero))
    return network, torch.randn(4, 4)


CASES["a new head"] = partial(hidden, "last.weight")
CASES["a new branch"] = partial(hidden, "scale")


@case
def a_new_head_behind_a_normalisation():
    """Its zeros replaced by ones, the head gave a gradient that the normalisation cancels, but for rounding."""
    layers = nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, CLASSES)
    layers[0].weight.data[:] = torch.tensor([1.0, -1] * 4)[:, None]
    nn.init.zeros_(layers[0].bias)
    nn.init.zeros_(layers[2].weight)
    return nn.Sequential(*layers), torch.tensor([[1.0, 0, 0, 0]] * 3)


# Changes in place, and orders in memory.


@case
def an_input_that_is_changed_when_a_shift_has_read_it():
    def call(net, x):
        made = net.before(x)
        shifted = made + net.shift
        made.mul_(2)
        return shifted.tanh() + made

    return Headed(call, before=nn.Linear(4, 4), shift=random(4)), torch.randn(4, 4)


@case
def an_input_that_is_changed_when_a_frozen_layer_has_read_it():
    def call(net, x):
        made = net.before(x)
        mapped = net.frozen(made)
        made.mul_(2)
        return mapped.tanh() + made

    network = Headed(call, before=nn.Linear(4, 4), frozen=nn.Linear(4, 4))
    network.frozen.weight.requires_grad_(False)
    return network, torch.randn(4, 4)


@case
def an_expanded_token_that_is_changed():
    def call(net, x):
        token = net.token.expand(len(x), -1)
        # Only what is no view of the parameter could be written to.
        return token + x if token._is_view() else token.add_(x)

    return Headed(call, token=random(1, 4)), torch.randn(3, 4)


@case
def parts_without_gradient():
    def call(net, x):
        with torch.no_grad():
            made = net.layer(x)
        return made.relu()

    return Headed(call, layer=nn.Linear(4, 4)), torch.randn(3, 4)


def on_maps(samples, *layers):
    return Headed(lambda net, x: net.layers(x), layers=nn.Sequential(*layers)), torch.randn(
        samples, 4, 5, 5
    )


@case
def functions_in_place():
    return on_maps(3, nn.Conv2d(4, 6, 3), nn.ReLU(True), nn.BatchNorm2d(6), nn.Hardswish(True))


@case
def a_batch_norm_without_running_statistics():
    """It is right for single samples alone."""
    return on_maps(1, nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, track_running_stats=False), nn.Tanh())


@case
def a_backward_pass_that_cannot_be_batched_with_channels_last():
    return on_maps(5, nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4, affine=False), nn.AdaptiveAvgPool2d(1))


@case
def views_that_hold_in_the_usual_order_of_memory_alone():
    layers = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.Tanh())
    network = Headed(lambda net, x: net.layers(x).view(len(x), -1), layers=layers)
    return network, torch.randn(3, 4, 5, 5)


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


@case
def a_backward_pass_that_cannot_be_batched():
    return Headed(lambda net, x: Square.apply(net.layer(x)), layer=nn.Linear(4, 5)), torch.randn(
        6, 4
    )


# Attention.

CAUSAL = torch.ones(5, 5).triu(1).bool()
SUMMED = torch.zeros(5, 5).double().masked_fill(CAUSAL, -torch.inf)
BY_HEAD = torch.stack([CAUSAL, CAUSAL.T])
BIAS = torch.arange(50.0).double().sin().view(2, 5, 5)  # by heads


def attends(mask=None, padded=False, needs_weights=True, causal=False):
    def call(net, x):  # [B, 5, 4]
        own = mask
        if mask is not None and mask.ndim == 3:
            own = mask.repeat(len(x), 1, 1)
        padding = None
        if padded:
            padding = (x[..., 0] > 0.5) & (torch.arange(5) > 0)
        options = {"key_padding_mask": padding, "need_weights": needs_weights, "is_causal": causal}
        mixed, weights = net.attention(x, x, x, attn_mask=own, **options)
        return torch.cat([mixed, weights], 2) if needs_weights else mixed

    return with_attention(call)


def with_attention(call, batch_first=True):
    layer = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    nn.init.normal_(layer.in_proj_bias)
    return Headed(call, attention=layer), torch.randn(4, 5, 4)


CASES |= {
    "attention": attends,
    "attention without weights": partial(attends, needs_weights=False),
    "attention to what is there": partial(attends, padded=True),
    "causal attention": partial(attends, CAUSAL, causal=True),
    "causal attention by a sum, without weights": partial(attends, SUMMED, needs_weights=False),
    "causal attention to what is there": partial(attends, CAUSAL, padded=True),
    "biased attention to what is there": partial(attends, BIAS[0], padded=True),
    "attention masked by heads": partial(attends, BY_HEAD, padded=True, needs_weights=False),
    "attention biased by heads": partial(attends, BIAS),
}


@case
def attention_to_other_tokens():
    return with_attention(lambda net, x: torch.cat(net.attention(x, x.tanh(), x.tanh()), 2))


def padded_on_the_left(batch_first):
    """The rows of the padding see nothing: they are zeros, as torch has them."""

    def call(net, x):  # [B, 5, 4]
        padding = x[..., 0] > 9
        rows = x if batch_first else x.transpose(0, 1)
        options = {"attn_mask": CAUSAL, "key_padding_mask": padding, "need_weights": False}
        mixed, _ = net.attention(rows, rows, rows, **options)
        return mixed[:, -1] if batch_first else mixed[-1]

    network, x = with_attention(call, batch_first)
    x[0, :2, 0] = 10
    x[3, :, 0] = 10
    return network, x


CASES["padding on the left"] = partial(padded_on_the_left, True)
CASES["padding on the left, positions first"] = partial(padded_on_the_left, False)


WITHOUT_FISHER = {
    "a parameter without entries": {"none"},
    "unused and frozen parameters": {"unused"},
    "a new head": {"inner.weight", "inner.bias", "scale"},
    "a new branch": {"inner.weight", "inner.bias"},
    "a new head behind a normalisation": {"0.weight", "0.bias"},
    "parts without gradient": {"layer.weight", "layer.bias"},
}
WITHOUT_FISHER |= {name: {"gate.weight"} for name in CASES if name.startswith("dispatched")}
NOBODY = {"experts.2.weight", "experts.2.bias"}
WITHOUT_FISHER |= {name: NOBODY for name in CASES if "nobody chooses" in name}


def made(name):
    torch.manual_seed(0)
    network, inputs = CASES[name]()
    return ready(network, inputs)


@pytest.mark.parametrize("name", CASES)
def test_fisher(name):
    network, inputs = made(name)
    assert_exact(network, inputs, WITHOUT_FISHER.get(name, set()))


RULED = {
    "tokens",
    "tokens with padding",
    "a new head",
    "a new branch",
    "a new head behind a normalisation",
}
RULED |= {name for name in CASES if "attention" in name} - {"attention to other tokens"}


@pytest.mark.parametrize("name", sorted(RULED))
def test_rules_hold_for_all_parameters(name):
    """Others are counted one sample and output after the other, which costs as much again."""
    network, inputs = made(name)
    assert fisher_sums(network, [inputs]).passes == len(inputs) * (1 + 2 * CLASSES)
