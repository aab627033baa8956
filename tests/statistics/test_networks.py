"""Networks that are no stack of layers: whatever they do with their parameters, the Fisher is autograd's."""

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, assert_exact, build, is_ruled
from torch import nn

TOKENS = torch.tensor([[0, 1, 1, 2, 0], [2, 2, 2, 2, 1], [0, 1, 2, 1, 2]])
CASES = {}


def case(*inputs):
    """Enter a call into the table, with its inputs or their size."""

    def enter(call):
        CASES[call.__name__] = call, inputs
        return call

    return enter


# Calls in unusual forms, and parameters without a rule.


@case(torch.arange(15.0).view(3, 5) % 3)
def a_table_of_which_a_column_is_read_as_integers(x, embed, layer):
    embedded = embed(x[:, 0].long())
    return torch.tanh(embedded + layer(x[:, 1:]))


@case(4, 3, 4)
def calls_with_keywords(x, scale, shift, token, weight):
    scaled = torch.mul(input=x, other=scale)
    shifted = torch.add(input=scaled, other=shift)
    tokens = token.expand(size=(len(x), -1, -1))
    rows = torch.cat([tokens, shifted], 1)
    return F.linear(weight=weight, bias=shift, input=rows.tanh())


@case(4, 4)
def calls_with_options_that_no_rule_knows(x, shift, scale, weight):
    shifted = torch.add(x, shift, alpha=2, out=None)
    return torch.addmm(scale, shifted, weight, beta=2, alpha=3)


@case(4, 4)
def a_view_of_a_weight(x, weight, shift):
    return F.linear(x, weight.T, shift)


@case(3, 4)
def a_product_of_parameters(x, scale, shift):
    return x * (scale * shift)


@case(5, 4)
def a_power(x, scale):
    return x.abs() ** scale


@case(3, 4)
def unused_and_frozen_parameters(x, half_frozen, shift):
    return half_frozen(x).tanh()


@case(3, 4)
def parts_without_gradient(x, layer):
    with torch.no_grad():
        made = layer(x)
    return made.relu()


def turned(x):
    """Rotary positions, that queries and keys are multiplied with."""
    angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1]))
    turns = torch.polar(torch.ones(5, 2), angles)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(2)


@case(3, 5, 4)
def complex_numbers(x, layer, other):
    scores = turned(layer(x)) @ turned(other(x)).mT
    return scores.softmax(-1) @ x


# Parameters that are used more than once.


@case(4, 4)
def modules_called_twice(x, layer, norm):
    once = norm(layer(x)).tanh()
    return norm(layer(once)).tanh()


@case(4, 4)
def parameters_used_outside_of_their_module(x, layer, norm):
    made = norm(layer(x)).tanh()
    return made + x @ layer.weight.T + norm.bias.sin()


@case(TOKENS)
def a_tied_head(tokens, embed, layer):
    made = layer(embed(tokens)).tanh()
    return F.linear(made.mean(1), embed.weight)


# Tokens.


@case(TOKENS)
def padded_tokens(tokens, padded):
    return padded(tokens).tanh()


@case(TOKENS)
def tokens_whose_gradient_is_sparse(tokens, sparse):
    return sparse(tokens).tanh()


@case(TOKENS[:, None].expand(3, 2, 5))
def tokens_in_several_rows(tokens, embed):
    embedded = embed(tokens.flatten(0, 1))
    return embedded.tanh().view(len(tokens), -1)


# Changes in place, and orders in memory.


@case(4, 4)
def an_input_that_is_changed_when_a_shift_has_read_it(x, layer, shift):
    made = layer(x)
    shifted = made + shift
    made.mul_(2)
    return shifted.tanh() + made


@case(4, 4)
def an_input_that_is_changed_when_a_frozen_layer_has_read_it(x, layer, half_frozen):
    made = layer(x)
    mapped = half_frozen(made)
    made.mul_(2)
    return mapped.tanh() + made


@case(3, 2, 4)
def an_expanded_token_that_is_changed(x, token):
    tokens = token.expand(len(x), 2, -1)
    # Only what is no view of the parameter could be written to.
    return tokens + x if tokens._is_view() else tokens.add_(x)


@case(3, 4, 5, 5)
def functions_in_place(x, conv, batch_norm):
    made = conv(x).relu_()
    return F.hardswish(batch_norm(made), inplace=True)


@case(1, 4, 5, 5)
def a_batch_norm_without_running_statistics(x, conv):
    """It is right for single samples alone."""
    return F.batch_norm(conv(x), None, None, training=True).tanh()


@case(5, 4, 5, 5)
def a_backward_pass_that_cannot_be_batched_with_channels_last(x, conv):
    return F.group_norm(conv(x), 2).mean((2, 3))


@case(3, 4, 5, 5)
def views_that_hold_in_the_usual_order_of_memory_alone(x, conv, batch_norm):
    return batch_norm(conv(x)).view(len(x), -1)


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


@case(6, 4)
def a_backward_pass_that_cannot_be_batched(x, layer):
    return Square.apply(layer(x))


@case(3, 5, 4)
def attention_to_other_tokens(x, attention):
    return torch.cat(attention(x, x.tanh(), x.tanh()), 2)


@pytest.mark.parametrize("name", CASES)
def test_fisher(name):
    call, inputs = CASES[name]
    assert_exact(*build(call, *inputs))


def test_rules_hold_for_tokens():
    assert is_ruled(*build(padded_tokens, TOKENS))


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


@pytest.mark.parametrize("samples", [1, 2, 4, 5])  # a sample has four positions
@pytest.mark.parametrize(
    "order", [samples_first, samples_first_and_flat, positions_first, positions_first_and_flat]
)
def test_rows_in_any_order(order, samples):
    def call(x, token, scale, shift, layer):  # [B, 3, 4]
        tokens = token.expand(len(x), -1, -1)
        rows = torch.cat([tokens, x * scale + shift], 1)
        return order(layer, rows).tanh()

    assert_exact(*build(call, samples, 3, 4))


ROUTES = [  # the choices of each sample's tokens: one token, or several
    "0 1 0 1",
    "01 10 11 00",  # one that some samples do not choose
    "00 00 00",  # one that nobody chooses
    "0011 0011 0001 0111",  # as many rows as if they were spread evenly
    "0101 0001 0111 1010",  # as many, in other places
    "011 101 110 011",  # every sample's tokens alike
]


@pytest.mark.parametrize("routes", ROUTES)
def test_every_token_goes_to_one_of_two_experts_by_its_first_entry(routes):
    def call(x, layer, other):  # [B, T, 4]
        rows = x.flatten(0, 1)
        mixed = torch.zeros_like(rows)
        for index, expert in enumerate([layer, other]):
            (places,) = torch.where(rows[:, 0].long() == index)
            mixed = mixed.index_add(0, places, expert(rows[places]).tanh())
        return mixed.view(len(x), -1)

    chosen = torch.tensor([list(map(int, tokens)) for tokens in routes.split()])
    x = torch.randn(*chosen.shape, 4)
    x[..., 0] = chosen + 0.5
    assert_exact(*build(call, x))


def one_hot(gates):
    return F.one_hot(gates.argmax(-1), 2).to(gates)


def the_largest(gates):
    return (gates == gates.amax(-1, keepdim=True)).to(gates)


def rounded(gates):
    return gates.softmax(-1).round()


# One in four was 20 % off: two copies of a sample said where all others' rows lie.
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("choose", [one_hot, the_largest, rounded])
def test_tokens_are_dispatched_by_products_with_a_choice(choose, seed):
    def call(x, gate, layer, other):  # [B, T, 4]
        rows = x.flatten(0, 1)
        chosen = choose(gate(rows))  # [B·T, 2]
        place = chosen * chosen.cumsum(0) - 1  # where a row stands in its expert's queue
        off = place[..., None] - torch.arange(len(rows))
        slots = (1 - off.abs()).relu()  # one-hot, [B·T, 2, slots]
        sent = torch.einsum("res,rd->esd", slots, rows)
        made = torch.stack([layer(sent[0]), other(sent[1])])
        return torch.einsum("res,esd->rd", slots, made.tanh()).view(len(x), -1)

    torch.manual_seed(seed)
    assert_exact(*build(call, 5, 3, 4))


def by_mask(x, numbers):
    return x[torch.arange(5) < numbers[:, None]]


def by_cutting(x, numbers):
    return torch.cat([own[:number] for own, number in zip(x, numbers, strict=True)])


def by_repeating(x, numbers):
    return torch.repeat_interleave(x[:, 0], numbers, 0)


@pytest.mark.parametrize("pick", [by_mask, by_cutting, by_repeating])
def test_samples_have_unequal_numbers_of_rows(pick):
    """Two copies of the first sample told nothing of the others: 27 to 39 % off."""

    def call(x, layer):
        numbers = x[:, 0, 0].long()
        rows = layer(pick(x, numbers)).tanh()
        return torch.stack([own.mean(0) for own in rows.split(numbers.tolist())])

    numbers = torch.tensor([3.0, 2, 4])
    assert_exact(*build(call, numbers[:, None, None] + torch.linspace(0, 0.5, 20).view(1, 5, 4)))


# Weights of zero hide the layers in front of them.


@pytest.mark.parametrize("zero", ["head.weight", "scale"])
def test_a_new_part(zero):
    def call(x, layer, scale):
        return x + layer(x).tanh() * scale

    network, inputs = build(call, 4, 4)
    nn.init.zeros_(network.get_parameter(zero))
    assert_exact(network, inputs)
    assert is_ruled(network, inputs)


def test_a_new_head_behind_a_normalisation():
    """Its zeros replaced by ones, the head gave a gradient that the normalisation cancels, but for rounding."""
    first = nn.Linear(4, 8)
    first.weight.data[:] = torch.tensor([1.0, -1] * 4)[:, None]
    nn.init.zeros_(first.bias)
    last = nn.Linear(8, CLASSES)
    nn.init.zeros_(last.weight)
    network = nn.Sequential(first, nn.LayerNorm(8, elementwise_affine=False), last).double()
    inputs = torch.tensor([[1.0, 0, 0, 0]] * 3).double()
    assert_exact(network, inputs)
    assert is_ruled(network, inputs)


# Attention.

CAUSAL = torch.ones(5, 5).triu(1).bool()
SUMMED = torch.zeros(5, 5).double().masked_fill(CAUSAL, -torch.inf)
BY_HEAD = torch.stack([CAUSAL, CAUSAL.T])
BIAS = torch.arange(50.0).double().sin().view(2, 5, 5)  # by heads
PADDING = torch.tensor([[False, True, False, False, True]])
ATTENTION = {  # the mask, the padding, and whether the weights are needed
    "plain": (None, None, True),
    "to what is there": (None, PADDING, True),
    "causal": (CAUSAL, None, True),
    "causal by a sum": (SUMMED, None, False),
    "masked by heads": (BY_HEAD, PADDING, False),
    "biased by heads": (BIAS, PADDING, True),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    def call(x, attention):
        mask, padding, need_weights = ATTENTION[name]
        if padding is not None:
            padding = padding.expand(len(x), -1)
        if mask is not None and mask.ndim == 3:
            mask = mask.repeat(len(x), 1, 1)
        is_causal = mask is CAUSAL
        mixed, weights = attention(x, x, x, padding, need_weights, mask, is_causal=is_causal)
        return torch.cat([mixed, weights], 2) if need_weights else mixed

    network, inputs = build(call, 4, 5, 4)
    assert_exact(network, inputs)
    assert is_ruled(network, inputs)


def test_padding_on_the_left():
    """Its rows see nothing: they are zeros, as torch has them."""

    def call(x, attention):
        rows = x[..., :4]
        padding = x[..., 4] > 0
        mixed, _ = attention(rows, rows, rows, padding, need_weights=False, attn_mask=CAUSAL)
        return mixed[:, -1]

    x = torch.randn(3, 5, 5)
    x[..., 4] = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    assert_exact(*build(call, x))
