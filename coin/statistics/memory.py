"""Planning a Fisher pass: which layer rules apply, and how many samples fit in memory."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coin.core.batches import Batch, channels_last, joined, tensors_in
from coin.statistics.sums import sum_type
from coin.statistics.tape import Tape

DEFAULT_MEMORY_MIB = 1024  # the default of memory_mib: a Fisher pass's peak beyond the network and the accumulators
# Tensors of the widest layer's cotangents alive at once: at its output and input, and what a rule makes of them.
_GRADIENTS = 6
# Floats kept for the backward pass per float of a ruled call's input: the input itself, and as much between calls.
_KEPT = 2
# Bytes of the widest layer's cotangents on CPUs: more gain no speed, fewer read the weights too often (ResNets, 32×32).
_ENOUGH_BYTES = 48 << 20


@dataclass(frozen=True)
class PassLayout:
    """The layout of a pass over samples of one shape: applicable rules and memory per sample."""

    # By the parameters that a layer rule may answer for, the leading rows of a sample in the input of its one call;
    # None if that has to be found out for every cut.
    rows: Mapping[str, int] | None
    activations: int  # floats per sample in the inputs of all ruled calls together
    widest: int  # floats per sample in the largest of those inputs
    outputs: int
    channels_last: bool  # in memory, if the network takes such images: then convolutions are faster


def find_layout(network: nn.Module, parameters: Mapping[str, Tensor], sample: Batch) -> PassLayout:
    """Find, on two copies of a sample [1, …], the calls whose rules can be trusted with samples of this shape."""
    two = joined([sample, sample])
    if any(tensor.ndim == 4 for tensor in tensors_in(two)):
        with suppress(RuntimeError):  # a view of its activations, or a backward pass, may hold in the usual order alone
            return _layout_of(network, parameters, channels_last(two), last=True)
    return _layout_of(network, parameters, two, last=False)


def _layout_of(network: nn.Module, parameters: Mapping[str, Tensor], two: Batch, *, last: bool) -> PassLayout:
    """Return the layout found on two copies of a sample, in the order of memory that they are in."""
    tape = Tape(parameters)
    output = tape.run(network, two)
    rows: dict[str, int] = {}
    try:
        untrusted = tape.misplaced(output, unseen=True) | tape.shared(output)
        for call in tape.calls:
            if untrusted.isdisjoint(call.names.values()):
                rows.update(dict.fromkeys(call.names.values(), len(call.inputs) // 2))
        tape.backward(output, torch.ones_like(output)[None], last=True)  # which has to be batched
    except RuntimeError:
        if last:
            raise
        rows, tape.sorts = {}, False
    sizes = [call.inputs.numel() // 2 for call in tape.calls] or [sum(each.numel() for each in tensors_in(two)) // 2]
    return PassLayout(None if tape.sorts else rows, sum(sizes), max(sizes), output.shape[1], last)


def choose_cut(layout: PassLayout, cotangents: int, memory_mib: int, like: Tensor) -> tuple[int, int]:
    """Choose how many samples b and cotangents v go through a pass together; one each at least.

    The estimate is b·(activations kept) + b·v·(widest layer)·(tensors alive). All V cotangents stay together as long as
    one sample fits, since the Gram rule gains from them; then v shrinks. `like` is a parameter, of the pass's type.
    """
    kept = layout.activations * _KEPT * like.element_size()
    widest = layout.widest * sum_type(like).itemsize
    available = memory_mib << 20
    samples = available // (kept + cotangents * widest * _GRADIENTS)
    if samples < 1:
        return 1, max(1, min(cotangents, (available - kept) // (widest * _GRADIENTS)))
    if like.device.type == "cpu":
        samples = min(samples, max(1, _ENOUGH_BYTES // (cotangents * widest)))
    return samples, cotangents
