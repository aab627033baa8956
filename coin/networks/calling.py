"""How a network is called: in a user's way, as a copy, with a batch that fits it."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from coin.core.batches import Batch, map_tensors, tensors_in
from coin.errors import DataError, StateError

Forward = Callable[[Any, Any], Tensor]
"""(network, batch) → logits ``[B, C]``: how a network is called that does not take one tensor and return another."""

Network = TypeVar("Network", bound=nn.Module)


def called_by(network: Network, forward: Forward | None) -> Network:
    """Return a copy that shares all tensors, and calls the user's function with an unchanged copy and the batch."""
    if forward is None:
        return network

    def call(self: nn.Module, batch: Any) -> Tensor:
        return forward(plain(copy.copy(self)), map_tensors(torch.clone, batch))  # which it may change

    shared = copy.copy(network)
    # In place of __call__, not of forward: hooks on the network then see the inner call, and that alone.
    shared.__dict__["_call_impl"] = MethodType(call, shared)
    return shared


def plain(network: Network) -> Network:
    """Undo, in place, the changes of `called_by`; return the network."""
    network.__dict__.pop("_call_impl", None)
    return network


def clone(network: Network, *, shared: bool = False) -> Network:
    """Return a copy of a network in the same modes, which shares all tensors with it or, by default, none."""
    memo = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())} if shared else {}
    # What a forward pass has left in attributes has a graph, which cannot be copied.
    left = (tensor for module in network.modules() for tensor in tensors_in(vars(module)) if not tensor.is_leaf)
    copied = copy.deepcopy(network, memo | {id(tensor): tensor.detach() for tensor in left})
    clear_caches(copied)
    return copied


def check_tensors(network: nn.Module, *, meta: bool = False) -> None:
    """Raise StateError for TorchScript, or where a tensor is sparse, lazy or, unless `meta`, on the meta device."""
    every = (*network.named_parameters(), *network.named_buffers())
    odd = [n for n, t in every if nn.parameter.is_lazy(t) or t.layout != torch.strided or (t.is_meta and not meta)]
    if odd or any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        found = f"'{odd[0]}', which is sparse, lazy or on the meta device," if odd else "TorchScript"
        raise StateError(f"found {found} in {type(network).__name__}, expected a module of dense tensors; convert it")


def clear_caches(network: nn.Module) -> None:
    """Clear what modules cache of their parameters in eval mode, as timm's LeViT does; their modes do not change."""
    modes = {module: module.training for module in network.modules()}
    for module, mode in modes.items():
        if type(module).train is not nn.Module.train:  # where the caches are cleared
            module.train()
            module.train(mode)
    for module, mode in modes.items():
        module.training = mode


def as_input(batch: Any, network: nn.Module) -> Batch:
    """Return a batch as ordinary tensors on the network's device, of its first real parameter's type or integers."""
    like = next((each for each in network.parameters() if each.is_floating_point()), None)

    def ready(tensor: Tensor) -> Tensor:
        if like is not None:
            tensor = tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
        return tensor.clone() if tensor.is_inference() else tensor.detach()  # autograd refuses inference tensors

    return map_tensors(ready, checked_batch(batch, network))


def checked_batch(batch: Any, network: nn.Module) -> Batch:
    """Return a batch, or the inputs of (inputs, labels): a tensor, or where a function calls the network, a mapping."""
    reads_any = "_call_impl" in network.__dict__ or getattr(network, "forward_by", None) is not None
    if isinstance(batch, tuple | list) and len(batch) in (1, 2) and not reads_any:
        batch = batch[0]
    if isinstance(batch, Mapping) and reads_any:
        sizes = {name: len(entry) if _is_batch(entry) else type(entry).__name__ for name, entry in batch.items()}
        if len(set(sizes.values())) != 1 or not all(map(_is_batch, batch.values())):
            raise DataError(f"found a batch of {sizes}, expected tensors [B, …] of as many samples, and nothing else")
    elif not _is_batch(batch):
        advice = "give the inputs alone" if reads_any else "or give forward=lambda network, batch: … to read others"
        expected = "a tensor [B, …], or tensors by name," if reads_any else "input tensors [B, …]"
        raise DataError(f"found a batch of type {type(batch).__name__}, expected {expected}; {advice}")
    return batch  # type: ignore[no-any-return]


@contextmanager
def explained_inputs(network: nn.Module, batch: Callable[[], Any]) -> Iterator[None]:
    """Turn a network's RuntimeError into a DataError where images [B, C, H, W] are not as its convolutions want them.

    `batch` returns the inputs; it is called after an error only.
    """
    try:
        yield
    except RuntimeError as error:
        wrong = "" if isinstance(error, torch.OutOfMemoryError) else _wrong_images(network, batch())
        if not wrong:
            raise
        raise DataError(wrong) from error


def _wrong_images(network: nn.Module, images: Any) -> str:
    """Say what is wrong with images for a network whose first layer with weights is a convolution; "" if nothing is."""
    first = next((each for each in network.modules() if next(each.parameters(recurse=False), None) is not None), None)
    if not isinstance(first, nn.Conv2d) or not isinstance(images, Tensor):
        return ""
    channels = first.in_channels
    found = f"found inputs {str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
    if not images.is_floating_point():
        return f"{found}, expected float images [B, {channels}, H, W]; normalise them as in training"
    if images.ndim == 4 and images.shape[1] != channels and images.shape[3] == channels:
        return f"{found}, expected channels first, [B, {channels}, H, W]; give inputs.permute(0, 3, 1, 2)"
    if images.ndim != 4:
        return f"{found}, expected batches [B, {channels}, H, W]; give inputs[None] for one image"
    return ""


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
