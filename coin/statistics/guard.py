"""Leave the caller's network as found: mode, buffers, gradients, and Lightning's inference mode."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from coin.core.batches import Batch, clear_caches, joined
from coin.errors import ConfigurationError


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a statistic is of: those that require gradients; if none does, all of them.

    Raises ConfigurationError where there are none, or one is complex: the square of its gradient is no real number.
    """
    every = {name: p for name, p in network.named_parameters() if p.is_floating_point() or p.requires_grad}
    parameters = {name: p for name, p in every.items() if p.requires_grad} or every
    if not parameters:
        raise ConfigurationError(
            f"found no floating-point parameters in {type(network).__name__}, expected at least one; give a network "
            "that has weights"
        )
    if complex_ones := [name for name, p in parameters.items() if p.is_complex()]:
        raise ConfigurationError(
            f"parameter '{complex_ones[0]}' is complex, expected real ones; hold its parts as a real tensor, or leave "
            "it out by requires_grad_(False)"
        )
    return parameters


def paired(network: nn.Module, sample: Batch, cotangents: Tensor) -> tuple[Batch, Tensor]:
    """Duplicate a sample ``[1, …]`` if the network has a BatchNorm; the copy's cotangents ``[…, 1, C]`` are zero.

    In PyTorch 2.13 on CPUs the backward pass of `torch.nn.functional.batch_norm` in eval mode is wrong for a batch of
    one whose gradient comes transposed, as behind ``flatten(2).transpose(1, 2)``; with two samples it is right.
    """
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return sample, cotangents
    return joined([sample, sample]), torch.cat([cotangents, torch.zeros_like(cotangents)], -2)


@contextmanager
def differentiable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Run a block in which these parameters require gradients; whether they did is left as found."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def disable_tf32() -> Iterator[None]:
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
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Run a block with the network in eval mode, and restore every module's mode."""
    # Caches are cleared before every pass and in the end: a pass without gradients, or of other parameters, makes some.
    modes = {module: module.training for module in network.modules()}
    try:
        for module in modes:
            module.training = False
        clear_caches(network)
        has_caches = any(type(module).train is not nn.Module.train for module in modes)
        with network.register_forward_pre_hook(lambda *_: clear_caches(network)) if has_caches else nullcontext():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        clear_caches(network)


@contextmanager
def evaluating(network: nn.Module, *, gradients: bool = True) -> Iterator[None]:
    """Run a block with the network in eval mode, at full precision, with gradients possible.

    A caller's `torch.no_grad`, `torch.inference_mode` and autocast are suspended, as are TF32 and bfloat16 inside
    products (`disable_tf32`). Modes, and buffers that the block wrote to, are restored. With gradients attention runs
    on its plain kernels: the fused ones, which take much less memory, can neither batch their backward pass nor
    differentiate forwards.
    """
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    fast = torch.backends.mha.get_fastpath_enabled()
    device = next((p.device.type for p in network.parameters()), "cpu")
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with (
            eval_mode(network),
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
            torch.autocast(device, enabled=False),
            sdpa_kernel(SDPBackend.MATH) if gradients else nullcontext(),
            disable_tf32(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        with torch.no_grad():
            # Their devices are waited for once, not for every buffer.
            changed = [(buffer != old).any() for buffer, old in buffers]
            if changed and bool(torch.stack([each.to(changed[0].device) for each in changed]).any()):
                for (buffer, old), differs in zip(buffers, changed, strict=True):
                    if bool(differs):
                        buffer.copy_(old)
