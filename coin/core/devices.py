"""Devices: which of them have float64, and in which precision they multiply float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WITHOUT_FLOAT64 = {"mps"}
"""The types of devices that have no float64, in which merges are computed: there they run on the CPU."""


def has_float64(device: torch.device) -> bool:
    """Say whether a device computes in float64."""
    return device.type not in WITHOUT_FLOAT64


def device_of(network: nn.Module) -> torch.device:
    """Return the device of a network's first parameter; the CPU where it has none."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64: on its device, or on the CPU where the device has none."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw the CPU's random numbers from a seed, and a GPU's; afterwards both go on from where they were.

    Other GPUs' generators are not touched, as they are by `torch.manual_seed`.
    """
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def disable_tf32() -> Iterator[None]:
    """Run a block without TF32 or bfloat16 inside the products of float32, of matrices and in convolutions."""
    try:
        convolutions, products = (
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
        )
    # Set by torch's newer settings, beside which it does not read the older ones.
    except RuntimeError:
        with _newer_settings_without_tf32():
            yield
        return
    try:
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def _newer_settings_without_tf32() -> Iterator[None]:
    backends: Any = torch.backends
    places = (*_products(), backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.conv)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def _products() -> tuple[Any, ...]:
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def multiplies_in_bfloat16() -> bool:
    """Say whether products of float32 matrices may be computed in bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # as in `disable_tf32`
        return any(place.fp32_precision == "bf16" for place in _products())
