"""What the Fisher's tests share: the definition, written out, and networks in a few lines."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from coin.statistics import fisher_diagonal

CLASSES = 3


def dense_loop(network: nn.Module, inputs: Tensor, copies: int = 1) -> dict[str, Tensor]:
    """One sample, in some copies, and one output at a time, squared after autograd has summed whatever it sums."""
    network.eval()
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x in inputs:
        for c in range(CLASSES):
            output = network(torch.stack([x] * copies))[0, c]
            gradients = torch.autograd.grad(output, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient**2
    return {name: value / len(inputs) for name, value in total.items()}


def assert_exact(
    network: nn.Module, inputs: Tensor, zero: Collection[str] | None = (), absolute: float = 1e-14
) -> None:
    """Compare whole, in unequal batches and in cuts of few; only the parameters named may have no Fisher, or any."""
    network = network.double().eval()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    expected = dense_loop(network, inputs)
    if zero is not None:
        assert {name for name, value in expected.items() if not value.any()} == set(zero)
    cuts = {"whole": [inputs], "pairs": list(inputs.split(2))}
    if len(inputs) > 1:
        cuts["unequal"] = list(inputs.split([1, len(inputs) - 1]))
    for cut, batches in cuts.items():
        found = fisher_diagonal(network, batches, memory_mib=1 if cut == "pairs" else 1024)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-10, atol=absolute, msg=lambda m, at=f"{name}, {cut}": f"{at}: {m}"
            )


class Net(nn.Module):
    """Some parts, and what becomes of an input: call(network, x)."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def random(*shape: int) -> nn.Parameter:
    """A parameter."""
    return nn.Parameter(torch.randn(shape))
