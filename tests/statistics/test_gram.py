"""Gram matrices against explicit im2col."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coin.errors import StateError
from coin.networks.small import SmallViT
from coin.statistics import gram_sums


def with_one(a: Tensor, bias: bool) -> Tensor:
    return torch.cat([a, torch.ones(*a.shape[:-1], 1, dtype=a.dtype)], -1) if bias else a


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolution_equals_im2col(bias: bool, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=groups, bias=bias).double()
    x = torch.randn(5, 4, 7, 6, dtype=torch.float64)
    found = gram_sums(conv, [x[:2], x[2:]])
    columns = F.unfold(x, (3, 2), (1, 2), (1, 2), (2, 1)).mT.reshape(-1, groups, 4 // groups * 6)
    a = with_one(columns, bias)
    expected = torch.einsum("rgi,rgj->gij", a, a)
    assert found.values.keys() == {"weight"}
    assert (found.count, found.passes) == (5, 5.0)
    torch.testing.assert_close(found.values["weight"], expected)
    # The order of the entries is that of weight.flatten(1): the layer's output follows from the columns.
    weight = conv.weight.reshape(groups, 8 // groups, -1)
    output = torch.einsum("rgk,gok->rgo", columns, weight).reshape(5, -1, 8).mT.view(5, 8, 4, 8)
    if bias:
        output = output + conv.bias.view(-1, 1, 1)
    torch.testing.assert_close(conv(x), output)


def test_linear_sums_over_positions_and_divides_by_samples() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    a = with_one(x.reshape(-1, 3), True)
    torch.testing.assert_close(gram_sums(layer, [x]).mean()["weight"], (a.mT @ a)[None] / 4)


def test_a_layer_called_twice_has_the_sum_over_its_calls() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3, bias=False).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    y = layer(x).detach()
    torch.testing.assert_close(gram_sums(nn.Sequential(layer, layer), [x]).values["0.weight"][0], x.T @ x + y.T @ y)


def test_a_weight_called_with_a_bias_and_without_is_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + F.linear(2 * x, self.layer.weight)

    with pytest.raises(StateError, match=r"'layer.weight' is used with its bias and without it, expected one way"):
        gram_sums(Both(), [torch.randn(4, 3)])


def test_what_has_no_matrix() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = nn.Embedding(5, 4), nn.ConvTranspose1d(4, 4, 2)
            self.frozen, self.head = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)
            self.mixing, self.scale = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.ones(4))

        def forward(self, tokens: Tensor) -> Tensor:
            h = torch.einsum("tl,blc->btc", self.mixing, self.up(self.embed(tokens).mT).mT)
            return self.head(self.frozen(h * self.scale).mean(1))

    tokens = torch.tensor([[0, 1, 4], [2, 2, 3]])
    assert gram_sums(Mixed(), [tokens]).values.keys() == {"head.weight"}
    assert not gram_sums(Mixed(), []).values


def test_every_linear_map_of_a_vision_transformer() -> None:
    torch.manual_seed(0)
    network = SmallViT(3, 8, 4, depth=1, heads=2, width=8, mlp_width=12).double().eval()
    block = network.encoder.layers[0]
    inputs: dict[str, Tensor] = {}
    block.ln_1.register_forward_hook(lambda _m, _i, out: inputs.update({"self_attention.in_proj_weight": out}))
    block.mlp[0].register_forward_pre_hook(lambda _m, args: inputs.update({"mlp.0.weight": args[0]}))
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    found = gram_sums(network, [images]).values
    inside = "encoder.layers.encoder_layer_0."
    assert found.keys() == {
        "conv_proj.weight",
        "heads.head.weight",
        *(f"{inside}{name}" for name in ("self_attention.in_proj_weight", "self_attention.out_proj.weight")),
        *(f"{inside}{name}" for name in ("mlp.0.weight", "mlp.3.weight")),
    }
    for name, value in inputs.items():
        a = with_one(value.reshape(-1, 8), True)  # all five tokens, the class token among them
        torch.testing.assert_close(found[inside + name], (a.mT @ a)[None])
    patches = with_one(F.unfold(F.instance_norm(images), 4, stride=4).mT.reshape(-1, 48), True)
    torch.testing.assert_close(found["conv_proj.weight"], (patches.mT @ patches)[None])


def test_sums_in_sixteen_bits_neither_stall_nor_overflow() -> None:
    found = gram_sums(nn.Linear(2, 3).bfloat16(), [torch.ones(1, 2)] * 600).mean()["weight"]
    assert torch.equal(found, torch.ones(1, 3, 3)), "bfloat16 counts to 256"
    convolution = nn.Conv2d(1, 3, 1, bias=False).half()
    found = gram_sums(convolution, [torch.full((4, 1, 1, 1), 300.0)]).mean()["weight"]
    assert torch.equal(found, torch.full((1, 1, 1), 9e4)), "float16 ends at 65504"
