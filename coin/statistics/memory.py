"""How many samples and cotangents to take at once: within the memory allowed, and no more than pays."""

from dataclasses import dataclass

from torch import Tensor

from coin.errors import ConfigurationError
from coin.statistics.probe import Layout

_GRADIENTS = 6
"""Tensors of the widest layer's cotangents alive at once: at its output and input, and what a rule makes of them."""

_KEPT = 2
"""Floats kept for the backward pass per float of a ruled call's input: the input itself, and as much between calls."""

_ENOUGH_BYTES = 48 << 20
"""On CPUs, cotangents of the widest layer beyond this many bytes gain no more speed, and only take memory: measured on
ResNets at 32×32, where smaller cuts read the weights too often."""


def check_memory(memory_mib: int) -> int:
    """Return a bound on the working memory, in MiB, after checking that there is some.

    Raises:
        ConfigurationError: It is below 1.
    """
    if memory_mib < 1:
        raise ConfigurationError(f"found memory_mib={memory_mib}, expected at least 1")
    return memory_mib


@dataclass(frozen=True)
class Cut:
    """How many samples b and cotangents v go through a pass together."""

    samples: int
    cotangents: int


def choose_cut(layout: Layout, cotangents: int, memory_mib: int, like: Tensor) -> Cut:
    """Choose the micro-batch and the chunk of cotangents.

    The estimate for b samples and v cotangents is b·(activations kept) + b·v·(widest layer)·(tensors alive). All V
    cotangents are kept together as long as one sample fits, since the Gram rule gains from them; then v shrinks. One
    sample and one cotangent always go, whatever the bound says.

    Args:
        layout: What the probe found.
        cotangents: V.
        memory_mib: The bound, in MiB.
        like: A parameter: its type and device are the pass's.
    """
    size = like.element_size()
    kept, widest = layout.activations * _KEPT * size, layout.widest * size
    available = memory_mib << 20
    samples = available // (kept + cotangents * widest * _GRADIENTS)
    if samples < 1:
        room = max(0, available - kept)
        return Cut(1, int(max(1, min(cotangents, room // (widest * _GRADIENTS)))))
    if like.device.type == "cpu":
        samples = min(samples, max(1, _ENOUGH_BYTES // (cotangents * widest)))
    return Cut(int(samples), cotangents)
