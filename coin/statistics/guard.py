"""Leave the caller's network as found: mode, buffers, gradients, and Lightning's inference mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from coin.errors import ConfigurationError


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, those that a statistic is of.

    Raises:
        ConfigurationError: There are none, or one is complex: the square of its gradient is no real number.
    """
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not parameters:
        raise ConfigurationError(
            "the network has no parameter that requires a gradient; expected at least one; call requires_grad_() on "
            "those that the statistic is of"
        )
    if complex_ones := [name for name, p in parameters.items() if p.is_complex()]:
        raise ConfigurationError(
            f"parameter '{complex_ones[0]}' is complex, expected real ones; hold its parts as a real tensor, or leave "
            "it out by requires_grad_(False)"
        )
    return parameters


@contextmanager
def full_products() -> Iterator[None]:
    """Run a block without TF32 or bfloat16 inside the products of float32, of matrices and in convolutions."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def evaluating(network: nn.Module, *, gradients: bool = True) -> Iterator[None]:
    """Run a block with the network in eval mode, at full precision, with gradients possible.

    Works inside a caller's `torch.no_grad`, `torch.inference_mode` and autocast, which are suspended, as are TF32 and
    bfloat16 inside products (`full_products`). Every module's mode is restored one by one, and a buffer that the block
    wrote to gets its old values back. Attention runs on its plain kernels: the fused ones can neither batch their
    backward pass nor differentiate forwards.
    """
    modes = {module: module.training for module in network.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    fast = torch.backends.mha.get_fastpath_enabled()
    device = next((p.device.type for p in network.parameters()), "cpu")
    try:
        for module in modes:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
            torch.autocast(device, enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            full_products(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, old in buffers:
                if not torch.equal(buffer, old):
                    buffer.copy_(old)
