"""Equality of networks to the last bit, and of results whose sums are in another order but for rounding."""

import math

import torch


def close(found, wanted, sums):
    """Say whether tensors differ by at most 8 ε √K of the largest value: sums of K products in another order."""
    tolerance = 8 * torch.finfo(wanted.dtype).eps * math.sqrt(sums) * float(wanted.abs().max())
    return torch.allclose(found, wanted, rtol=0, atol=tolerance)


def check_equal(network, other):
    """Compare the tensors of two networks, by name and to the last bit."""
    torch.testing.assert_close(network.state_dict(), other.state_dict(), rtol=0, atol=0)
