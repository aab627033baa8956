"""Equality but for rounding, of results whose sums are in another order."""

import math

import torch


def close(found, wanted, sums):
    """Say whether tensors differ by at most 8 ε √K of the largest value: sums of K products in another order."""
    tolerance = 8 * torch.finfo(wanted.dtype).eps * math.sqrt(sums) * float(wanted.abs().max())
    return torch.allclose(found, wanted, rtol=0, atol=tolerance)
