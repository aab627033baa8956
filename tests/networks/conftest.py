"""What tests of networks from optional packages share."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from coin.statistics import fisher_diagonal


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function after which importing a package fails."""
    return lambda package: monkeypatch.setitem(sys.modules, package, None)


@pytest.fixture
def check_fisher() -> Callable[[nn.Module, Tensor], None]:
    """Return a function that compares a network's Fisher on inputs [P, …] with a loop over samples and outputs."""

    def check(network: nn.Module, x: Tensor) -> None:
        expected = {key: torch.zeros_like(tensor) for key, tensor in network.named_parameters()}
        for sample in x:
            for logit in network(sample[None])[0]:
                grads = torch.autograd.grad(
                    logit, list(network.parameters()), retain_graph=True, materialize_grads=True
                )
                for total, grad in zip(expected.values(), grads, strict=True):
                    total += grad**2 / len(x)
        scale = max(float(tensor.max()) for tensor in expected.values())
        for key, tensor in fisher_diagonal(network, [x]).items():
            torch.testing.assert_close(
                tensor, expected[key], rtol=1e-3, atol=1e-5 * scale, msg=lambda m, k=key: f"{k}: {m}"
            )

    return check
