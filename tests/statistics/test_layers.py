"""Layer by layer: a network of it, its Fisher and its Gram matrices, against autograd in float64."""

import pytest
import torch
from dense import (
    CLASSES,
    Net,
    assert_close,
    assert_exact,
    fisher_by_autograd,
    gram_by_autograd,
    random,
)
from torch import nn

from coin.statistics import fisher_diagonal, fisher_sums, gram_sums


class Layer(nn.Module):
    """A layer that sees the k rows of a sample side by side, [B·k, …]; before it is a scale, behind it a head."""

    def __init__(self, layer, shape, k):
        super().__init__()
        self.k = k
        self.scale = random(*shape)
        self.layer = layer
        self.head = nn.LazyLinear(CLASSES)

    def forward(self, x):  # [B, k, *shape], or [B, *shape] where k is 1
        rows = x if self.k == 1 else x.flatten(0, 1)
        made = torch.tanh(self.layer(torch.sin(rows * self.scale)))
        return self.head(made.reshape(len(x), -1))


def network_of(name, k=1, samples=4):
    """A network with a layer of the table, and inputs."""
    torch.manual_seed(0)
    make, *shape = LAYERS[name]
    network = Layer(make(), shape, k)
    rows = [samples] if k == 1 else [samples, k]
    inputs = torch.randn(*rows, *shape)
    network(inputs)  # makes the head
    for values in [*network.parameters(), *network.buffers()]:
        if values.ndim == 1:  # of a normalisation they are 0 or 1
            values.data.uniform_(0.5, 2)
    return network.double().eval(), inputs.double()


class Scaled(nn.Module):
    """A parameter that is multiplied with activations, and one that is added."""

    def __init__(self, *shape):
        super().__init__()
        self.scale = random(*shape)
        self.shift = random(*shape)

    def forward(self, x):
        return torch.sin(x * self.scale) + self.shift


LAYERS = {  # a layer, and the shape of its inputs
    "linear": (lambda: nn.Linear(4, 5), 4),
    "linear at a few positions": (lambda: nn.Linear(4, 5, bias=False), 3, 2, 4),
    "linear at many positions": (lambda: nn.Linear(4, 5), 80, 4),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), 4, 4, 4),
    "strided and padded": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1)), 4, 5, 4),
    "dilated": (lambda: nn.Conv2d(4, 6, (3, 2), 1, (1, 2), (1, 2), bias=False), 4, 6, 5),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), 4, 6, 6),
    "large map": (lambda: nn.Conv2d(4, 6, 3, padding=1), 4, 12, 11),
    "large map, grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), 4, 12, 11),
    "pointwise, strided": (lambda: nn.Conv2d(4, 6, 1, (2, 3)), 4, 5, 6),
    "to one position": (lambda: nn.Conv2d(4, 6, (2, 3)), 4, 2, 3),
    "of one position": (lambda: nn.Conv2d(4, 6, 3, padding=1), 4, 1, 1),
    "one dimension, long": (lambda: nn.Conv1d(4, 6, 5, 1, 1, 2, groups=2), 4, 70),
    "three dimensions": (lambda: nn.Conv3d(4, 6, 2, padding=1), 4, 3, 2, 3),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), 4, 5, 5),
    "same, uneven": (lambda: nn.Conv2d(4, 6, 2, padding="same"), 4, 5, 5),
    "valid": (lambda: nn.Conv2d(4, 6, 2, padding="valid"), 4, 5, 5),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), 4, 5, 5),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2), 4, 3, 3),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), 6, 9, 9),
    "depthwise, few positions": (lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6), 6, 2, 2),
    "depthwise, strided": (lambda: nn.Conv2d(6, 6, (3, 5), 2, (1, 2), groups=6), 6, 15, 10),
    "depthwise, one dimension": (lambda: nn.Conv1d(6, 6, 5, 3, 2, groups=6), 6, 100),
    "depthwise, three dimensions": (lambda: nn.Conv3d(6, 6, 2, padding=1, groups=6), 6, 2, 5, 4),
    "two outputs a channel": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), 3, 9, 9),
    "batch norm": (lambda: nn.BatchNorm2d(4), 4, 2, 2),
    "layer norm": (lambda: nn.LayerNorm(4), 3, 4),
    "layer norm of maps": (lambda: nn.LayerNorm([4, 2, 2]), 4, 2, 2),
    "layer norm without weights": (lambda: nn.LayerNorm(4, elementwise_affine=False), 3, 4),
    "group norm": (lambda: nn.GroupNorm(2, 4), 4, 2, 2),
    "group norm without weights": (lambda: nn.GroupNorm(2, 4, affine=False), 4, 2, 2),
    "scale and shift": (lambda: Scaled(4), 3, 4),
}  # fmt: skip
UNRULED = {"same, uneven", "transposed"}  # the layers whose parameters autograd counts


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_fisher(name, k):
    network, inputs = network_of(name, k)
    assert_exact(network, inputs)
    is_ruled = fisher_sums(network, [inputs]).passes == len(inputs) * (1 + 2 * CLASSES)
    assert is_ruled == (name not in UNRULED)


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - UNRULED))
def test_gram_matrices(name):
    network, inputs = network_of(name, samples=3)
    found = gram_sums(network, inputs.split([1, 2]))
    assert (found.count, found.passes) == (3, 3.0)
    assert_close(dict(found.values), gram_by_autograd(network, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["linear", "convolution", "grouped", "depthwise", "layer norm", "scale and shift"]
)
def test_sixteen_bits_are_squared_and_summed_in_full_precision(name, dtype):
    """The passes themselves are rounded, each sample's by itself; the sums over samples are not."""
    network, inputs = network_of(name, 2, samples=40)
    network.to(dtype)
    found = fisher_diagonal(network, inputs.to(dtype).split(1))
    expected = fisher_by_autograd(network.double(), inputs.to(dtype).double())
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        error = (found[key] - value).norm() / value.norm()
        assert error < 8 * torch.finfo(dtype).eps, key


def test_sums_in_sixteen_bits_neither_stall_nor_overflow():
    ones = [torch.ones(1, 2)] * 600
    large = [torch.full((4, 2), 300.0)]
    counted = nn.Linear(2, CLASSES, bias=False).bfloat16()  # bfloat16 counts to 256
    squared = nn.Linear(2, CLASSES, bias=False).half()  # float16 ends at 65504
    for network, batches, value in ((counted, ones, 1.0), (squared, large, 9e4)):
        fisher = fisher_diagonal(network, batches)["weight"]
        gram = gram_sums(network, batches).mean()["weight"]
        assert torch.equal(fisher, torch.full((CLASSES, 2), value))
        assert torch.equal(gram, torch.full((1, 2, 2), value))


LARGE = {  # more numbers than a rule makes at a time: of a cotangent's, of some outputs', of a sample's
    "some cotangents": (lambda: nn.Linear(300, 400), 40, 300),
    "some outputs": (lambda: nn.Linear(520, 520), 40, 520),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), 6, 250, 250),
    "scale and shift": (lambda: Scaled(300, 500), 4, 300, 500),
}


@pytest.mark.parametrize("name", LARGE)
def test_gradients_of_many_numbers(name):
    torch.manual_seed(0)
    make, *shape = LARGE[name]
    pooled = nn.Sequential(make(), nn.Tanh(), nn.Flatten(2), nn.AdaptiveAvgPool1d(3), nn.Flatten())
    network = nn.Sequential(pooled, nn.LazyLinear(CLASSES))
    inputs = torch.randn(2, *shape)
    network(inputs)
    network, inputs = network.double(), inputs.double()
    assert_close(fisher_diagonal(network, [inputs]), fisher_by_autograd(network, inputs))


CANCELLING = {  # of which the inputs at a sample's positions add up to zero, under one and the same cotangent
    "linear": lambda: nn.Linear(4, 8, bias=False),
    "pointwise": lambda: nn.Conv1d(4, 8, 1, bias=False),
    "grouped": lambda: nn.Conv1d(4, 8, 1, groups=2, bias=False),
    "convolution": lambda: nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular", bias=False),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CANCELLING)
def test_contributions_that_cancel_are_never_negative(name, seed):
    torch.manual_seed(seed)
    positions = -2 if name == "linear" else -1
    call = lambda net, x: net.head(net.layer(x).mean(positions))  # noqa: E731
    network = Net(call, layer=CANCELLING[name](), head=nn.Linear(8, CLASSES))
    x = torch.randn(3, 4, 4)
    x -= x.mean(positions, keepdim=True)
    assert fisher_diagonal(network, [x])["layer.weight"].min() >= 0
