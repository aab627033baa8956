"""What the statistics' tests share: the definitions by autograd, written out, and networks in a few lines."""

from functools import partial

import torch
from torch import nn

from coin.statistics import fisher_diagonal

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
                output, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient**2
    return {name: value / len(inputs) for name, value in total.items()}


def gram_by_autograd(network, inputs):
    """Σ a aᵀ over samples and positions, a the gradient of a group's first output there by the weights that make it."""
    kept = {}

    def keep(name, module, arguments, output):
        kept[name] = module, output

    maps = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
    for name, module in network.named_modules():
        if isinstance(module, maps):
            module.register_forward_hook(partial(keep, name))
    total = {}
    for x in inputs:
        network(x[None])
        for name, (module, output) in kept.items():
            key = f"{name}.weight" if name else "weight"
            total[key] = total.get(key, 0) + _gram_of(module, output)
    return total


def _gram_of(module, output):
    """The matrices [G, K, K] of one call."""
    is_linear = isinstance(module, nn.Linear)
    by_position = output if is_linear else output.movedim(1, -1)
    rows = by_position.reshape(-1, len(module.weight))
    groups = 1 if is_linear else module.groups
    parameters = list(module.parameters())
    grams = []
    for output in range(0, len(module.weight), len(module.weight) // groups):
        a = []
        for row in rows:
            gradients = torch.autograd.grad(row[output], parameters, retain_graph=True)
            a.append(torch.cat([gradient[output].flatten() for gradient in gradients]))
        a = torch.stack(a)
        grams.append(a.T @ a)
    return torch.stack(grams)


def assert_close(found, expected, relative=1e-10, absolute=1e-14):
    """Compare tensors by name."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=relative, atol=absolute, msg=lambda m, at=name: f"{at}: {m}"
        )


def assert_exact(network, inputs, zero=(), absolute=1e-14):
    """Compare a Fisher with autograd's: whole, in unequal batches, and in cuts of few; those named alone have none."""
    expected = fisher_by_autograd(network, inputs)
    assert {name for name, value in expected.items() if not value.any()} == set(zero)
    assert_close(fisher_diagonal(network, [inputs]), expected, absolute=absolute)
    unequal = [inputs[:1], inputs[1:]] if len(inputs) > 1 else [inputs]
    assert_close(fisher_diagonal(network, unequal), expected, absolute=absolute)
    cut = fisher_diagonal(network, inputs.split(2), memory_mib=1)
    assert_close(cut, expected, absolute=absolute)


class Net(nn.Module):
    """Some parts, and what becomes of an input: call(network, x)."""

    def __init__(self, call, **parts):
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.call(self, x)


class Headed(Net):
    """The same with a head that reads all numbers [B, …] of what the call returns, and is made by the first pass."""

    def __init__(self, call, **parts):
        super().__init__(call, **parts)
        self.head = nn.LazyLinear(CLASSES)

    def forward(self, x):
        made = self.call(self, x)
        return self.head(made.flatten(1))


def ready(network, inputs):
    """A network and inputs in float64 and eval mode, its head made."""
    network = network.double().eval()
    if inputs.is_floating_point():
        inputs = inputs.double()
    network(inputs)
    return network, inputs


def random(*shape):
    """A parameter."""
    return nn.Parameter(torch.randn(shape))
