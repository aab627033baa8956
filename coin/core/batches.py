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
    return map_tensors(lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t, batch)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a batch, or of nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def size_of(batch: Batch) -> int:
    """Return the number of samples in a batch."""
    return len(tensors_in(batch)[0])


def shapes_in(batch: Batch) -> tuple[tuple[Any, ...], ...]:
    """Return the names and shapes of a sample's tensors, which must agree for batches to be joined."""
    named = {"": batch} if isinstance(batch, Tensor) else batch
    return tuple((name, *tensor.shape[1:]) for name, tensor in named.items())


def take(batch: Batch, samples: slice | Tensor) -> Batch:
    """Return some of a batch's samples: a slice, or places, int64."""
    return map_tensors(lambda each: each[samples if isinstance(samples, slice) else samples.to(each.device)], batch)


def samples_of(batch: Batch) -> Iterator[Batch]:
    """Return a batch's samples as batches of one."""
    return (take(batch, slice(place, place + 1)) for place in range(size_of(batch)))


def joined(batches: Sequence[Batch]) -> Batch:
    """Return several batches as one; a DataError where their samples differ in shape."""
    first, shapes = batches[0], list(dict.fromkeys(map(shapes_in, batches)))
    if len(shapes) > 1:
        found = " and ".join(" ".join(str(list(shape)) for _, *shape in each) for each in shapes[:2])
        raise DataError(f"found calibration samples of shapes {found} to run together, expected one shape; pad them")
    columns = [torch.cat(tensors) for tensors in zip(*map(tensors_in, batches), strict=True)]
    return columns[0] if isinstance(first, Tensor) else dict(zip(first, columns, strict=True))
