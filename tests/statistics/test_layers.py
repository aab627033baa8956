"""Layer by layer: a network of it, its Fisher and its Gram matrices, against autograd in float64."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from dense import (
    CLASSES,
    assert_close,
    assert_exact,
    build,
    fisher_by_autograd,
    is_ruled,
    random,
)
from torch import nn

from coin.statistics import fisher_diagonal, gram_sums


class Scaled(nn.Module):
    """A parameter that is multiplied with activations, and one that is added."""

    def __init__(self, *shape):
        super().__init__()
        self.scale = random(*shape)
        self.shift = random(*shape)

    def forward(self, x):
        return torch.sin(x * self.scale) + self.shift


TABLE = yaml.safe_load(Path(__file__).with_name("layers.yaml").read_text())
LAYERS = TABLE["maps"] | TABLE["others"]


def layer_of(row):
    """A layer, and the size of its samples."""
    name, arguments, options, size = row
    kind = Scaled if name == "Scaled" else getattr(nn, name)
    return kind(*arguments, **options), size


def network_of(name, k, samples=4):
    """A network whose layer sees the k rows of a sample side by side, [B·k, …], and inputs."""
    layer, size = layer_of(LAYERS[name])

    def call(x, scale, layer):
        rows = x.flatten(0, 1)
        made = torch.tanh(layer(torch.sin(rows * scale)))
        return made.reshape(len(x), -1)

    return build(call, samples, k, *size, scale=random(*size), layer=layer)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_fisher(name, k):
    network, inputs = network_of(name, k)
    assert_exact(network, inputs)
    assert is_ruled(network, inputs) == (name != "same, uneven")


def gram_by_autograd(layer, x):
    """Σ a aᵀ [G, K, K] over positions, a the gradient of a group's first output there by what makes it."""
    outputs = layer(x) if isinstance(layer, nn.Linear) else layer(x).movedim(1, -1)
    positions = outputs.flatten(0, -2)
    height = outputs.shape[-1] // getattr(layer, "groups", 1)
    grams = []
    for group in positions.split(height, 1):
        first = len(grams) * height
        a = []
        for output in group[:, 0]:
            gradients = torch.autograd.grad(output, list(layer.parameters()), retain_graph=True)
            a.append(torch.cat([gradient[first].flatten() for gradient in gradients]))
        rows = torch.stack(a)
        grams.append(rows.T @ rows)
    return torch.stack(grams)


@pytest.mark.parametrize("name", TABLE["maps"])
def test_gram_matrices(name):
    layer, size = layer_of(LAYERS[name])
    layer.double()
    x = torch.randn(3, *size).double()
    found = gram_sums(layer, x.split([1, 2]))
    assert (found.count, found.passes) == (3, 3.0)
    assert_close(found.values, {"weight": gram_by_autograd(layer, x)})


@pytest.mark.parametrize(
    "name", ["linear", "convolution", "grouped", "depthwise", "layer norm", "scale and shift"]
)
def test_sixteen_bits_are_squared_and_summed_in_full_precision(name):
    """The passes themselves are rounded, each sample's by itself; the sums over samples are not."""
    network, inputs = network_of(name, 2, samples=40)
    rounded = inputs.bfloat16()
    found = fisher_diagonal(network.bfloat16(), rounded.split(1))
    expected = fisher_by_autograd(network.double(), rounded.double())
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        error = (found[key] - value).norm() / value.norm()
        assert error < 8 * torch.finfo(torch.bfloat16).eps, key


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


@pytest.mark.parametrize("name", TABLE["large"])
def test_gradients_of_many_numbers(name):
    layer, size = layer_of(TABLE["large"][name])

    def pooled(x, layer):
        made = layer(x).tanh().flatten(2)
        return F.adaptive_avg_pool1d(made, 3)

    network, inputs = build(pooled, 2, *size, layer=layer)
    assert_close(fisher_diagonal(network, [inputs]), fisher_by_autograd(network, inputs))


@pytest.mark.parametrize("seed", range(3))
def test_contributions_that_cancel_are_never_negative(seed):
    """A sample's inputs add up to zero over its positions, at which one and the same cotangent arrives."""
    torch.manual_seed(seed)
    x = torch.randn(3, 4, 40).double()
    x -= x.mean(1, keepdim=True)
    network, inputs = build(lambda x, layer: layer(x).mean(1), x, layer=nn.Linear(40, 8))
    fisher = fisher_diagonal(network, [inputs])["layer.weight"]
    assert fisher.min() >= 0
