"""Devices, and which of them have float64."""

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
