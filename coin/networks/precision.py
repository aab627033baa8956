"""Mixed precision ends at a network's output: what is decoded, compared or added up is in full precision."""

import torch
from torch import Tensor


def full_precision(values: Tensor) -> Tensor:
    """Return values that autocast left in 16 bits as float32, and others as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
