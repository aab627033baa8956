"""How a network is called: with a tensor or with tensors by name, as a copy, with a batch that fits it."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from coin.core.batches import Batch, map_tensors, tensors_in
from coin.errors import DataError, StateError

Network = TypeVar("Network", bound=nn.Module)


def logits_of(network: nn.Module, batch: Batch) -> Tensor:
    """Return a network's logits; tensors by name are its keyword arguments, and of an output with `logits` these count.

    Networks that are called otherwise are wrapped in a module that is called so.
    """
    output = network(**batch) if isinstance(batch, Mapping) else network(batch)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def clone(network: Network, *, shared: bool = False) -> Network:
    """Return a copy of a network in the same modes, which shares all tensors with it or, by default, none."""
    memo = {}
    if shared:
        every = (*network.parameters(), *network.buffers())
        memo = {id(tensor): tensor for tensor in every}
    for module in network.modules():
        for tensor in tensors_in(vars(module)):
            # What a forward pass has left in an attribute has a graph, which cannot be copied.
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach()
    copied = copy.deepcopy(network, memo)
    clear_caches(copied)
    return copied


def check_tensors(network: nn.Module, *, meta: bool = False) -> None:
    """Raise StateError for TorchScript, or where a tensor is sparse, lazy or, unless `meta`, on the meta device."""
    found = None
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        found = "TorchScript"
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        is_dense = tensor.layout == torch.strided and not nn.parameter.is_lazy(tensor)
        if not is_dense or (tensor.is_meta and not meta):
            found = f"'{name}', which is sparse, lazy or on the meta device,"
            break
    if found is not None:
        raise StateError(
            f"found {found} in {type(network).__name__}, expected a module of dense tensors; convert it"
        )


@contextmanager
def same_modes(network: nn.Module) -> Iterator[None]:
    """Run a block and restore the modes of a network's modules."""
    modes = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def clear_caches(network: nn.Module) -> None:
    """Clear what modules cache of their parameters in eval mode, as timm's LeViT does; their modes do not change."""
    with same_modes(network):
        for module in network.modules():
            if type(module).train is not nn.Module.train:  # where the caches are cleared
                training = module.training
                module.train()
                module.train(training)


def as_input(batch: Any, network: nn.Module) -> Batch:
    """Return a batch as ordinary tensors on the network's device, of its first real parameter's type or integers."""
    floating = [parameter for parameter in network.parameters() if parameter.is_floating_point()]
    like = floating[0] if floating else None

    def ready(tensor: Tensor) -> Tensor:
        if like is not None:
            tensor = tensor.to(like.device)
            tensor = tensor.to(like.dtype) if tensor.is_floating_point() else tensor
        # Autograd refuses inference tensors.
        return tensor.clone() if tensor.is_inference() else tensor.detach()

    return map_tensors(ready, checked_batch(batch))


def checked_batch(batch: Any) -> Batch:
    """Return a batch, a tensor or tensors by name, or the inputs of (inputs, labels); a DataError for anything else."""
    if isinstance(batch, tuple | list) and len(batch) in (1, 2):
        batch = batch[0]
    if _is_batch(batch):
        return batch  # type: ignore[no-any-return]
    if not isinstance(batch, Mapping):
        raise DataError(
            f"found a batch of type {type(batch).__name__}, expected a tensor [B, …], or tensors by name"
        )
    entries = batch.values()
    if not all(map(_is_batch, entries)) or len(set(map(len, entries))) != 1:
        raise DataError(
            f"found a batch of {[*batch]}, expected tensors [B, …] of as many samples, and nothing else"
        )
    return batch


@contextmanager
def explained_inputs(network: nn.Module, batch: Callable[[], Any]) -> Iterator[None]:
    """Turn a network's RuntimeError into a DataError where images [B, C, H, W] are not as its convolutions want them.

    `batch` returns the inputs; it is called after an error only.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        images = batch()
        expected = _expected_images(network, images)
        if expected is None:
            raise
        dtype = str(images.dtype).removeprefix("torch.")
        shape = [*images.shape]
        raise DataError(f"found inputs {dtype} {shape}, expected {expected}") from error


def _expected_images(network: nn.Module, images: Any) -> str | None:
    """Say which images a network wants whose first layer with weights is a convolution; None for those it has."""
    first = None
    for first in network.modules():
        if [*first.parameters(recurse=False)]:
            break
    if not isinstance(first, nn.Conv2d) or not isinstance(images, Tensor):
        return None
    channels = first.in_channels
    if not images.is_floating_point():
        return f"float images [B, {channels}, H, W]; normalise them as in training"
    if images.ndim != 4:
        return f"batches [B, {channels}, H, W]; give inputs[None] for one image"
    _, second, _, last = images.shape
    if second != channels and last == channels:
        return f"channels first, [B, {channels}, H, W]; give inputs.permute(0, 3, 1, 2)"
    return None


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
