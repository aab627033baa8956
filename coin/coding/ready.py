"""Ready-made codes."""

import torch

from coin.coding.code import Code
from coin.errors import ConfigurationError, DecodingError


def uniform(num_experts: int) -> Code:
    """Return the code of one coded model that weighs all experts alike, β_i = 1/N; its noise amplification is N.

    >>> coin.uniform(4)
    Code([[0.25, 0.25, 0.25, 0.25]])
    """
    return convex(num_experts, 1)


def convex(num_experts: int, num_coded: int) -> Code:
    """Return R convex rows for N experts that decode every erasure of up to R experts.

    - R = 1: uniform weights. R = N: the identity, a copy of each expert, which no code amplifies less than.
    - R = 2 … 4 with N ≤ 8: tabulated rows. They minimise the worst noise amplification over all erasures of R
      experts, as found by gradient descent on a soft maximum from 96 random starts; weights under 0.01 were then
      dropped where that cost less than 5 %. Sparse rows win: (4, 5) is one pair of experts per coded model.
    - otherwise: Gaussian bumps, ``matrix[r, i] ∝ exp(−(t_i − c_r)²/2w²)`` with evenly spaced t and c and the width
      of least amplification from a grid. The Gaussian kernel is strictly totally positive, so every R columns are
      independent in exact arithmetic, but the amplification grows fast with R and N − R (`Code.worst_amplification`).

    Source: Karlin, *Total positivity* (1968), chapter 1, for the Gaussian kernel.

    Raises ConfigurationError unless 1 ≤ R ≤ N, DecodingError where no width gives a code that can be decoded in
    floating point.

    >>> coin.convex(3, 2).erasures()
    [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    """
    if num_experts < 1:
        raise ConfigurationError(f"found {num_experts} experts, expected at least 1")
    if not 1 <= num_coded <= num_experts:
        found = f"found {num_coded} coded models for {num_experts} experts"
        raise ConfigurationError(f"{found}, expected 1 to {num_experts}")
    if num_coded == 1:
        return Code([[1 / num_experts] * num_experts])
    if num_coded == num_experts:
        return Code(torch.eye(num_experts, dtype=torch.float64))
    if (num_coded, num_experts) in PRECOMPUTED_CODES:
        return Code(torch.tensor(PRECOMPUTED_CODES[num_coded, num_experts], dtype=torch.float64) / 1000)
    nodes = torch.linspace(0, 1, num_experts, dtype=torch.float64)
    centres = torch.linspace(0, 1, num_coded, dtype=torch.float64)
    codes, refusals = list[Code](), list[DecodingError]()
    for width in (2 ** (exponent / 2) for exponent in range(-6, 2)):
        bumps = torch.exp(-(((nodes - centres[:, None]) / width) ** 2) / 2)
        try:
            codes.append(Code(bumps / bumps.sum(1, keepdim=True)))
        except DecodingError as error:
            refusals.append(error)
    if not codes:
        told = f"found no well-conditioned code of {num_coded} rows for {num_experts} experts ({refusals[-1]})"
        raise DecodingError(f"{told}; use fewer rows")
    return min(codes, key=Code.worst_amplification)


PRECOMPUTED_CODES: dict[tuple[int, int], tuple[tuple[int, ...], ...]] = {
    # (R, N): rows in thousandths; beside it the worst noise amplification.
    (2, 3): ((564, 436, 0), (0, 437, 563)),  # 3.15
    (2, 4): ((399, 378, 223, 0), (0, 223, 378, 399)),  # 6.45
    (2, 5): ((318, 313, 234, 135, 0), (134, 0, 234, 319, 313)),  # 10.92
    (2, 6): ((274, 260, 218, 158, 90, 0), (90, 0, 158, 219, 275, 258)),  # 16.53
    (2, 7): ((242, 224, 200, 157, 113, 64, 0), (64, 0, 114, 157, 200, 241, 224)),  # 23.48
    (2, 8): ((206, 196, 177, 173, 116, 84, 48, 0), (47, 0, 85, 137, 144, 178, 214, 195)),  # 31.73
    (3, 4): ((501, 499, 0, 0), (378, 0, 479, 143), (0, 378, 142, 480)),  # 3.60
    (3, 5): ((433, 286, 281, 0, 0), (106, 0, 357, 169, 368), (104, 358, 0, 369, 169)),  # 7.38
    (3, 6): ((347, 339, 160, 154, 0, 0), (153, 0, 342, 0, 346, 159), (0, 155, 0, 341, 157, 347)),  # 12.14
    (3, 7): ((333, 318, 172, 93, 84, 0, 0), (86, 0, 175, 326, 0, 329, 84), (0, 85, 171, 0, 322, 91, 331)),  # 18.34
    (3, 8): (  # 28.74
        (292, 275, 157, 154, 65, 57, 0, 0),
        (56, 0, 105, 238, 311, 0, 235, 55),
        (15, 73, 158, 0, 56, 271, 140, 287),
    ),
    (4, 5): ((617, 383, 0, 0, 0), (0, 381, 619, 0, 0), (0, 381, 0, 619, 0), (0, 381, 0, 0, 619)),  # 4.03
    (4, 6): (  # 8.99
        (421, 371, 184, 24, 0, 0),
        (242, 0, 0, 493, 22, 243),
        (0, 178, 439, 10, 0, 373),
        (0, 323, 0, 0, 499, 178),
    ),
    (4, 7): (  # 16.50
        (361, 314, 191, 93, 41, 0, 0),
        (235, 0, 0, 268, 103, 0, 394),
        (20, 0, 323, 0, 352, 184, 121),
        (0, 302, 0, 280, 94, 324, 0),
    ),
    (4, 8): (  # 27.64
        (293, 274, 260, 106, 62, 4, 1, 0),
        (151, 1, 24, 130, 305, 56, 330, 3),
        (7, 168, 1, 54, 198, 382, 1, 189),
        (0, 69, 300, 313, 1, 1, 73, 243),
    ),
}
