"""Ready-made codes."""

from pathlib import Path

import torch

from coin.coding.code import Code
from coin.errors import ConfigurationError, DecodingError
from coin.files.yaml import read_yaml

TABULATED = Path(__file__).with_name("codes.yaml")
WIDTHS = [2 ** (exponent / 2) for exponent in range(-6, 2)]


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
    - otherwise: Gaussian bumps, ``matrix[r, i] ∝ exp(−(t_i − c_r)²/2w²)`` with evenly spaced t and c and the width
      of least amplification from a grid. The Gaussian kernel is strictly totally positive, so every R columns are
      independent in exact arithmetic, but the amplification grows fast with R and N − R (`Code.worst_amplification`).

    Source: Karlin, *Total positivity* (1968), chapter 1, for the Gaussian kernel.

    Raises ConfigurationError unless 1 ≤ R ≤ N, DecodingError where no width gives a code that can be decoded in
    floating point.

    >>> coin.convex(3, 2).erasures()
    [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    """
    if not 1 <= num_coded <= num_experts:
        found = f"found {num_coded} coded models for {num_experts} experts"
        raise ConfigurationError(f"{found}, expected 1 to {num_experts}")
    if num_coded == 1:
        row = [1 / num_experts] * num_experts
        return Code([row])
    if num_coded == num_experts:
        identity = torch.eye(num_experts, dtype=torch.float64)
        return Code(identity)
    tabulated = read_yaml(TABULATED)
    thousandths = tabulated.get(f"{num_coded} of {num_experts}")
    if thousandths is not None:
        weights = torch.tensor(thousandths, dtype=torch.float64) / 1000
        return Code(weights)
    return _gaussian_bumps(num_experts, num_coded)


def _gaussian_bumps(num_experts: int, num_coded: int) -> Code:
    """Return the code of Gaussian bumps with the least noise amplification; see `convex`."""
    nodes = torch.linspace(0, 1, num_experts, dtype=torch.float64)
    centres = torch.linspace(0, 1, num_coded, dtype=torch.float64)
    codes = []
    for width in WIDTHS:
        distances = (nodes - centres[:, None]) / width  # [R, N]
        bumps = torch.exp(-(distances**2) / 2)
        rows = bumps / bumps.sum(1, keepdim=True)
        try:
            codes.append(Code(rows))
        except DecodingError as error:
            refusal = error
    if not codes:
        raise DecodingError(
            f"found no code of {num_coded} rows for {num_experts} experts ({refusal}); use fewer rows"
        )
    return min(codes, key=Code.worst_amplification)
