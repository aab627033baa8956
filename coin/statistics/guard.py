"""Leave the caller's network as found: mode, buffers, gradients, and Lightning's inference mode."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from coin.core.batches import Batch, as_input, clear_caches, joined
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


_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations", "timm.layers.activations")
_PARTS = 16  # of a batch, one of which is computed beside it at a time


@contextmanager
def activations_in_place(network: nn.Module) -> Iterator[None]:
    """Run a block without gradients in which activations overwrite their inputs, to take less memory.

    They do so some samples at a time; it is right where nothing else reads these inputs (`can_overwrite`).
    """
    modules = _activations(network)
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = _overwriting(module.forward)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _activations(network: nn.Module) -> list[nn.Module]:
    every = (module for module in network.modules() if type(module).__module__ in _ACTIVATIONS)
    return [module for module in every if not [*module.parameters(), *module.children()]]


def _overwriting(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def overwrite(*args: Tensor) -> Tensor:
        if len(args) != 1:
            return forward(*args)
        for part in torch.split(args[0], max(1, len(args[0]) // _PARTS)):
            part.copy_(forward(part))
        return args[0]

    return overwrite


def can_overwrite(network: nn.Module, inputs: Batch) -> bool:
    """Return whether a network has activations, and its outputs stay the same to the bit if they overwrite inputs."""
    if not _activations(network):
        return False
    with evaluating(network, gradients=False), suppress(RuntimeError, TypeError):
        expected = network(as_input(inputs, network))
        with activations_in_place(network):
            return bool(torch.equal(network(as_input(inputs, network)), expected))
    return False
