"""Leave the caller's network as found: mode, buffers, gradients, and Lightning's inference mode."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from coin.core.batches import Batch, size_of, take
from coin.core.devices import device_of, disable_tf32
from coin.errors import ConfigurationError, StateError
from coin.networks.calling import clear_caches, logits_of, same_modes

_LOCK = threading.RLock()  # held in blocks of `eval_mode`


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the real parameters that a statistic is of: those that require gradients; if none does, all of them.

    Raises ConfigurationError where there are none.
    """
    every = {name: p for name, p in network.named_parameters() if p.is_floating_point()}
    if not every:
        raise ConfigurationError(
            f"found no floating-point parameters in {type(network).__name__}, expected some"
        )
    trained = {name: p for name, p in every.items() if p.requires_grad}
    return trained or every


def check_apart(network: nn.Module, inputs: Batch, outputs: Tensor) -> None:
    """Raise StateError where the outputs [B, C] of the first or last sample depend on what else is in the batch."""
    ends = [0, size_of(inputs) - 1]
    with torch.no_grad():
        together = outputs[ends]
        singles = [take(inputs, slice(n, n + 1)) for n in ends]
        alone = torch.cat([logits_of(network, single) for single in singles])
    error = (together - alone).abs()
    precision = torch.finfo(alone.dtype).eps
    tolerance = precision**0.5 * alone.abs().amax()
    if bool((error > tolerance).any()):
        raise StateError(
            f"{type(network).__name__} gives a sample other outputs beside others than alone, or at every call; "
            "take out what mixes samples (BatchNorms without running statistics) or is random"
        )


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
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Run a block with the network in eval mode and on copies of its inputs, and restore every module's mode.

    Threads take turns, since modes are the network's.
    """

    # Caches are cleared before every pass and in the end: a pass without gradients, or of other parameters, makes some.
    def prepare(module: nn.Module, arguments: Any, options: Any) -> Any:
        clear_caches(network)
        # Which the network may change in place.
        return tree_map_only(Tensor, torch.clone, (arguments, options))

    with _LOCK:
        try:
            with (
                same_modes(network),
                network.register_forward_pre_hook(prepare, with_kwargs=True),
            ):
                for module in network.modules():
                    module.training = False
                yield
        finally:
            clear_caches(network)


def _copy_of_one(module: nn.Module, inputs: object, output: Tensor) -> None:
    """Have a BatchNorm's gradient copied for a batch of one: PyTorch 2.13 is wrong on CPUs if that comes transposed."""
    if output.requires_grad and len(output) == 1:
        output.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]


@contextmanager
def evaluating(network: nn.Module, *, gradients: bool = True) -> Iterator[None]:
    """Run a block with the network in eval mode, at full precision, with gradients possible.

    A caller's `torch.no_grad`, `torch.inference_mode` and autocast are suspended, as are TF32 and bfloat16 inside
    products. Modes are restored. With gradients attention runs on its plain kernels: the fused ones can neither batch
    their backward pass nor differentiate forwards.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    device = device_of(network)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with (
            ExitStack() as hooks,
            eval_mode(network),
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
            torch.autocast(device.type, enabled=False),
            sdpa_kernel(SDPBackend.MATH) if gradients else nullcontext(),
            disable_tf32(),
        ):
            for module in network.modules():
                if gradients and isinstance(module, _BatchNorm):
                    hooks.enter_context(module.register_forward_hook(_copy_of_one))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
