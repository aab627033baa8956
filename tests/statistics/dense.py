"""What the statistics' tests share: the definitions by autograd, written out, and networks in a few lines."""

from functools import partial
from inspect import signature

import torch
from torch import nn

from coin.statistics import fisher_diagonal, fisher_sums

CLASSES = 3


def fisher_by_autograd(network, inputs, kind="exact", copies=1):
    """One sample, in some copies, and one output at a time, squared after autograd has summed whatever it sums."""
    network.eval()
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x in inputs:
        outputs = network(torch.stack([x] * copies))[0]
        if kind == "categorical":  # Σ_c p_c (∂ log p_c)²
            outputs = outputs.softmax(0).detach().sqrt() * outputs.log_softmax(0)
        for output in outputs:
            gradients = torch.autograd.grad(
                output, list(parameters.values()), retain_graph=True, materialize_grads=True
            )
            for value, gradient in zip(total.values(), gradients, strict=True):
                value += gradient**2
    return {name: value / len(inputs) for name, value in total.items()}


# Tensors by name.
assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-14)


def assert_exact(network, inputs):
    """Compare a Fisher with autograd's: whole, in unequal batches, and in cuts of few."""
    expected = fisher_by_autograd(network, inputs)
    assert any(value.any() for value in expected.values())
    assert_close(fisher_diagonal(network, [inputs]), expected)
    unequal = inputs.split(max(1, len(inputs) - 1))
    assert_close(fisher_diagonal(network, unequal), expected)
    assert_close(fisher_diagonal(network, inputs.split(2), memory_mib=1), expected)


def is_ruled(network, inputs):
    """Say whether rules hold for all parameters: others are counted sample by sample, which costs as much again."""
    return fisher_sums(network, [inputs]).passes == len(inputs) * (1 + 2 * CLASSES)


class Net(nn.Module):
    """A head that reads all numbers [B, …] of call(x, part, …), and is made by the first pass."""

    def __init__(self, call, parts):
        super().__init__()
        self.call = call
        self.names = list(parts)
        for name, part in parts.items():
            setattr(self, name, part)
        self.head = nn.LazyLinear(CLASSES)

    def forward(self, x):
        made = self.call(x, *[getattr(self, name) for name in self.names])
        return self.head(made.flatten(1))


def random(*shape):
    """A parameter."""
    return nn.Parameter(torch.randn(shape))


def half_frozen():
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    return layer


PARTS = {
    "layer": lambda: nn.Linear(4, 4),
    "other": lambda: nn.Linear(4, 4),
    "half_frozen": half_frozen,
    "gate": lambda: nn.Linear(4, 2, bias=False),
    "norm": lambda: nn.LayerNorm(4),
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
}


def build(call, *inputs, **parts):
    """A `Net` in float64 and eval mode, with the parts that its call names, and inputs, or random ones of a size.

    Parts are given or made. No bias, scale or statistic is 0 or 1, which would hide errors.
    """
    _, *names = signature(call).parameters
    made = {name: parts[name] if name in parts else PARTS[name]() for name in names}
    network = Net(call, made).double().eval()
    x = inputs[0] if isinstance(inputs[0], torch.Tensor) else torch.randn(inputs)
    if x.is_floating_point():
        x = x.double()
    network(x)
    for values in [*network.parameters(), *network.buffers()]:
        if values.ndim == 1:
            values.data.uniform_(0.5, 2)
    return network, x
