"""Ready-made codes."""

from pathlib import Path

import torch

from coin.coding.code import Code
from coin.errors import ConfigurationError
from coin.files.yaml import read_yaml

TABULATED = Path(__file__).with_name("codes.yaml")


def uniform(num_experts: int) -> Code:
    """Return the code of one coded model that weighs all experts alike, β_i = 1/N; its noise amplification is N.

    >>> coin.uniform(4)
    Code([[0.25, 0.25, 0.25, 0.25]])
    """
    return convex(num_experts, 1)


def convex(num_experts: int, num_coded: int) -> Code:
    """Return R convex rows for N experts that decode every erasure of up to R experts.

    - R = 1: uniform weights. R = N: the identity, a copy of each expert, which no code amplifies less than.
    - R = 2 … 4 with N ≤ 8: the rows of ``codes.yaml``, found by minimising the worst noise amplification. Sparse rows
      win: (4, 5) is one pair of experts per coded model.

    Raises ConfigurationError for other sizes: with more rows and experts the amplification grows fast, and the weights
    are better chosen for the losses that matter.

    >>> coin.convex(3, 2).erasures()
    [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    """
    if not 1 <= num_coded <= num_experts:
        found = f"found {num_coded} coded models for {num_experts} experts"
        raise ConfigurationError(f"{found}, expected at least one, and at most one an expert")
    if num_coded == 1:
        row = [1 / num_experts] * num_experts
        return Code([row])
    if num_coded == num_experts:
        identity = torch.eye(num_experts, dtype=torch.float64)
        return Code(identity)
    tabulated = read_yaml(TABULATED)
    thousandths = tabulated.get(f"{num_coded} of {num_experts}")
    if thousandths is None:
        raise ConfigurationError(
            f"found no ready code of {num_coded} coded models for {num_experts} experts, expected 1, {num_experts}, "
            "or 2 to 4 for up to 8 experts; give the rows of weights"
        )
    weights = torch.tensor(thousandths, dtype=torch.float64) / 1000
    return Code(weights)
