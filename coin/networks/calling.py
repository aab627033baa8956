"""How a network is called and copied: with a tensor or tensors by name, of its type and on its device."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any, TypeVar

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
    """Return a copy of a network in the same modes, which shares all tensors with it or, by default, none.

    Raises StateError where a module holds a function of a module: the copy would go on calling the original's.
    """
    for name, module in network.named_modules():
        # Metrics and their like make their functions anew in copies.
        makes_functions_anew = type(module).__setstate__ is not nn.Module.__setstate__
        if not makes_functions_anew and _holds_closure(module):
            raise StateError(
                f"layer '{name}' of {type(network).__name__} holds a function of a module, which copies would share; "
                "make it a method"
            )
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


def _holds_closure(module: nn.Module) -> bool:
    """Return whether an attribute or a hook is a function that refers to a module, or to a method of one."""
    for value in vars(module).values():
        for held in value.values() if isinstance(value, dict) else [value]:
            cells = held.__closure__ or () if isinstance(held, FunctionType) else ()
            contents = [cell.cell_contents for cell in cells]
            if any(isinstance(getattr(each, "__self__", each), nn.Module) for each in contents):
                return True
    return False


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
    entries = batch.values() if isinstance(batch, Mapping) else [batch]
    are_tensors = all(isinstance(entry, Tensor) and entry.ndim > 0 for entry in entries)
    if not are_tensors or len(set(map(len, entries))) != 1:
        raise DataError(
            f"found a batch of type {type(batch).__name__}, expected a tensor [B, …], or tensors by name of as many "
            "samples, and nothing else"
        )
    return batch  # type: ignore[no-any-return]
