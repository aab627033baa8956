"""Batches: a tensor, or tensors by name, whose first axis is the samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from coin.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the channels of images in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)

Batch = Tensor | Mapping[str, Tensor]
"""Tensors whose first axis is the samples: one ``[B, …]``, or several by name, such as tokens with their mask."""


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Return a batch with a function applied to every tensor."""
    if isinstance(batch, Tensor):
        return function(batch)
    return {name: function(tensor) for name, tensor in batch.items()}


def channels_last(batch: Batch) -> Batch:
    """Return a batch with the channels of its images [B, C, H, W], if it has any, last in memory."""

    def ordered(tensor: Tensor) -> Tensor:
        if tensor.ndim != 4:
            return tensor
        return tensor.contiguous(memory_format=torch.channels_last)

    return map_tensors(ordered, batch)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a batch, or of nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in tensors_in(part)]


def size_of(batch: Batch) -> int:
    """Return the number of samples in a batch."""
    return len(tensors_in(batch)[0])


def shapes_in(batch: Batch) -> tuple[tuple[Any, ...], ...]:
    """Return the names and shapes of a sample's tensors, which must agree for batches to be joined."""
    if isinstance(batch, Tensor):
        return (("", *batch.shape[1:]),)
    return tuple((name, *tensor.shape[1:]) for name, tensor in batch.items())


def take(batch: Batch, samples: slice | Tensor) -> Batch:
    """Return some of a batch's samples: a slice, or places, int64."""

    def taken(tensor: Tensor) -> Tensor:
        places = samples if isinstance(samples, slice) else samples.to(tensor.device)
        return tensor[places]

    return map_tensors(taken, batch)


def samples_of(batch: Batch) -> Iterator[Batch]:
    """Return a batch's samples as batches of one."""
    for place in range(size_of(batch)):
        yield take(batch, slice(place, place + 1))


def joined(batches: Sequence[Batch]) -> Batch:
    """Return several batches as one; a DataError where their samples differ in shape."""
    shapes = {shapes_in(batch) for batch in batches}
    if len(shapes) > 1:
        told = " and ".join(str(each) for each in sorted(shapes))
        raise DataError(
            f"found calibration samples of shapes {told} to run together, expected one shape; pad them"
        )
    first = batches[0]
    parts: Sequence[Any] = batches
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    return {name: torch.cat([part[name] for part in parts]) for name in first}
