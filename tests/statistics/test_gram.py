"""Which maps of a network have Gram matrices, and of which rows."""

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, assert_close, build, random
from torch import nn

from coin.errors import StateError
from coin.statistics import gram_sums


def product(rows):
    """Σ a aᵀ over rows with a last entry of one, [1, K + 1, K + 1]."""
    a = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    return (a.T @ a)[None]


def grams(network, *batches):
    """The matrices but for those of the head."""
    values = gram_sums(network, batches).values
    return {name: value for name, value in values.items() if name != "head.weight"}


def test_a_layer_called_twice_has_the_sum_over_its_calls():
    network, x = build(lambda x, layer: layer(layer(x)), 3, 4)
    expected = product(x) + product(network.layer(x))
    assert_close(grams(network, x), {"layer.weight": expected})


def test_a_weight_called_with_its_bias_and_without_is_refused():
    network, x = build(lambda x, layer: layer(x) + F.linear(x, layer.weight), 3, 4)
    with pytest.raises(StateError, match=r"'layer.weight' is used with its bias and without it"):
        grams(network, x)


def test_a_bias_of_another_layer_does_not_count():
    def call(tokens, embed, shift):
        return F.linear(embed(tokens), embed.weight, shift)

    tokens = torch.tensor([[0, 1], [2, 2]])
    network, _ = build(call, tokens, shift=random(CLASSES))
    rows = network.embed(tokens).flatten(0, 1)
    assert_close(grams(network, tokens), {"embed.weight": (rows.T @ rows)[None]})


def test_what_has_no_matrix():
    def call(tokens, embed, up, weight, half_frozen, scale):
        mapped = up(embed(tokens).mT).mT
        mixed = torch.einsum("tl,blc->btc", weight, mapped)
        return half_frozen(mixed * scale)

    tokens = torch.tensor([[0, 1, 2], [2, 2, 1]])
    network, _ = build(call, tokens, up=nn.ConvTranspose1d(4, 4, 2))
    assert not grams(network, tokens)
    assert not gram_sums(network, []).values


def test_an_expert_that_no_token_of_a_batch_goes_to_keeps_what_other_batches_bring():
    def call(x, layer, other):  # [B, T, 4]
        goes = x[..., 0] > 0
        mixed = torch.zeros_like(x)
        mixed[goes] = layer(x[goes])
        mixed[~goes] = other(x[~goes])
        return mixed

    x = torch.randn(2, 3, 4)
    x[..., 0] = torch.tensor([[1.0], [-1]])
    network, x = build(call, x)
    expected = {"layer.weight": product(x[0]), "other.weight": product(x[1])}
    assert_close(grams(network, x), expected)
    assert_close(grams(network, *x.split(1)), expected)


def test_the_projections_of_attention():
    network, x = build(lambda x, attention: attention(x, x, x)[0], 3, 5, 4)
    mixed, _ = network.attention(x, x, x)
    # The projection is square: its input follows from its output.
    projection = network.attention.out_proj
    projected = (mixed - projection.bias).flatten(0, 1)
    read = torch.linalg.solve(projection.weight, projected.T).T
    expected = {
        "attention.in_proj_weight": product(x.flatten(0, 1)),
        "attention.out_proj.weight": product(read),
    }
    assert_close(grams(network, x), expected, rtol=1e-8)
