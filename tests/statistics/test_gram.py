"""Which maps of a network have Gram matrices, and of which rows."""

import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, Net, assert_close
from torch import nn

from coin.errors import StateError
from coin.networks.small import SmallViT
from coin.statistics import gram_sums


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def product(rows):
    """Σ a aᵀ over rows with a last entry of one, [1, K + 1, K + 1]."""
    a = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    return (a.T @ a)[None]


def test_the_entries_are_in_the_order_of_the_weight():
    """Of a pull that is the weight times the Gram matrix, RegMean's solution is the weight."""
    layer = nn.Conv2d(4, 8, (3, 2), (2, 1), (1, 2), (1, 2), groups=2, bias=False).double()
    x = torch.randn(5, 4, 7, 6).double()
    gram = gram_sums(layer, [x]).values["weight"]
    weight = layer.weight.reshape(2, 4, -1)
    by_group = layer(x).movedim(1, -1).reshape(-1, 2, 4)  # [positions, G, O/G]
    expected = torch.einsum("pgo,pgo->go", by_group, by_group)
    torch.testing.assert_close((weight @ gram * weight).sum(2), expected)


def test_the_mean_divides_by_samples():
    x = torch.randn(4, 5, 3).double()
    found = gram_sums(nn.Linear(3, 2).double(), [x]).mean()
    assert_close(found, {"weight": product(x.flatten(0, 1)) / 4})


def test_a_layer_called_twice_has_the_sum_over_its_calls():
    layer = nn.Linear(3, 3).double()
    x = torch.randn(4, 3).double()
    expected = product(x) + product(layer(x))
    assert_close(dict(gram_sums(nn.Sequential(layer, layer), [x]).values), {"0.weight": expected})


def test_a_weight_called_with_its_bias_and_without_is_refused():
    network = Net(
        lambda net, x: net.layer(x) + F.linear(2 * x, net.layer.weight), layer=nn.Linear(3, 3)
    )
    with pytest.raises(
        StateError, match=r"'layer.weight' is used with its bias and without it, expected one way"
    ):
        gram_sums(network, [torch.randn(4, 3)])


def test_a_bias_of_another_layer_does_not_count():
    network = Net(lambda net, x: net.head(net.embed(x).mean(1)), embed=nn.Embedding(CLASSES, 4))
    network.head = nn.Linear(4, CLASSES)
    network.head.weight = network.embed.weight
    found = gram_sums(network, [torch.tensor([[0, 1], [2, 2]])]).values
    assert found.keys() == {"embed.weight"}
    assert found["embed.weight"].shape == (1, 4, 4)


def test_what_has_no_matrix():
    def call(net, tokens):
        mapped = net.up(net.embed(tokens).mT).mT
        mixed = torch.einsum("tl,blc->btc", net.mixing, mapped)
        return net.head(net.frozen(mixed * net.scale).mean(1))

    parts = {
        "embed": nn.Embedding(5, 4),
        "up": nn.ConvTranspose1d(4, 4, 2),
        "head": nn.Linear(4, 2),
    }
    parts |= {"mixing": nn.Parameter(torch.randn(3, 4)), "scale": nn.Parameter(torch.ones(4))}
    network = Net(call, frozen=nn.Linear(4, 4).requires_grad_(False), **parts)
    tokens = torch.tensor([[0, 1, 4], [2, 2, 3]])
    assert gram_sums(network, [tokens]).values.keys() == {"head.weight"}
    assert not gram_sums(network, []).values


def test_an_expert_that_no_token_of_a_batch_goes_to_keeps_what_other_batches_bring():
    def call(net, x):  # [B, T, 4]
        rows = x.flatten(0, 1)
        goes = rows[:, 0] > 0
        mixed = torch.zeros(len(rows), 5).double()
        for expert, places in ((net.one, goes), (net.other, ~goes)):
            mixed[places] = expert(rows[places])
        return net.head(mixed.view(len(x), -1, 5).mean(1))

    parts = {"one": nn.Linear(4, 5), "other": nn.Linear(4, 5), "head": nn.Linear(5, CLASSES)}
    network = Net(call, **parts).double()
    x = torch.randn(2, 3, 4).double()
    x[..., 0] = torch.tensor([[1.0], [-1]])
    expected = {"one.weight": product(x[0]), "other.weight": product(x[1])}
    for batches in ([x], x.split(1)):
        found = dict(gram_sums(network, batches).values)
        del found["head.weight"]
        assert_close(found, expected)


def test_every_linear_map_of_a_vision_transformer():
    network = SmallViT(CLASSES, 8, 4, depth=1, heads=2, width=8, mlp_width=12).double().eval()
    block = network.encoder.layers[0]
    prefix = "encoder.layers.encoder_layer_0"
    seen = {}

    def keep(module, name):
        def hook(module, arguments, output):
            made = output[0] if isinstance(output, tuple) else output
            seen[f"{prefix}.{name}"] = made.detach().flatten(0, -2)

        module.register_forward_hook(hook)

    keep(block.ln_1, "self_attention.in_proj_weight")
    keep(block.self_attention, "self_attention.out_proj.weight")
    keep(block.ln_2, "mlp.0.weight")
    keep(block.mlp[1], "mlp.3.weight")
    images = torch.randn(3, 3, 8, 8).double()
    found = dict(gram_sums(network, [images]).values)
    # The projection is square: its input follows from the attention's output.
    projection = block.self_attention.out_proj
    name = f"{prefix}.self_attention.out_proj.weight"
    projected = (seen[name] - projection.bias).detach()
    seen[name] = torch.linalg.solve(projection.weight.detach(), projected.T).T
    patches = F.unfold(F.instance_norm(images), 4, stride=4)
    seen["conv_proj.weight"] = patches.mT.reshape(-1, 48)
    del found["heads.head.weight"]
    assert_close(found, {name: product(rows) for name, rows in seen.items()}, relative=1e-8)
