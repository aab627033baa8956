"""Experts and calibration batches for tests of odd networks."""

import torch

from coin.core.batches import clone

CLASSES = 3


def moved(network, seed, by=0.1):
    """A network near another: an expert of the same initialisation."""
    other, draw = clone(network), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter))
    return other


def batches(*shape, count=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [[torch.randn(8, *shape, generator=draw, dtype=torch.float64)] for _ in range(count)]
