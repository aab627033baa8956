"""The code: the weighted sums of experts' outputs that coded models approximate, and the solution of its equations."""

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from coin.errors import ConfigurationError, DecodingError

MAX_AMPLIFICATION = 1e4
"""An erasure whose noise amplification is larger cannot be decoded: at 1e6 rounding alone costs 4 % of agreement."""

MAX_ERASURES = 20_000
"""How many largest erasures a code may have: all are checked, and the ready-made ones chosen by them."""


class Code:
    """An R×N matrix of coding weights, one convex row per coded model.

    Coded model r approximates ``Σ_i matrix[r, i] · f_i``. A code of R rows promises to decode every erasure of up to R
    experts (of up to N where R > N); one that cannot is refused here rather than at the first loss. For R = 1 that
    means every weight is positive: an expert with weight 0 leaves no trace in the coded model.

    Args:
        matrix: Coding weights ``[R, N]``, R ≥ 1 and N ≥ 1; rows non-negative with sum 1 (within 1e-6). Kept in
            float64 with its rows divided by their sums, unless these are 1 but for rounding.

    Raises ConfigurationError where the matrix is no rectangle of finite numbers, a weight is negative, or a row does
    not sum to 1; DecodingError where an erasure of up to R experts cannot be decoded, the first of which it names.

    >>> code = coin.Code([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    >>> code.num_coded, code.max_erasures, code.encode(torch.eye(3)[:, None]).tolist()
    (2, 2, [[[0.5, 0.5, 0.0]], [[0.0, 0.5, 0.5]]])
    """

    def __init__(self, matrix: Sequence[Sequence[float]] | Tensor) -> None:
        self.matrix: Tensor = _validated(matrix)
        if (found := math.comb(self.num_experts, self.max_erasures)) > MAX_ERASURES:
            raise ConfigurationError(
                f"found {found} erasures of {self.max_erasures} of {self.num_experts} experts, expected at most "
                f"{MAX_ERASURES}, each of which is checked; use fewer rows"
            )
        # Leaving experts out of an erasure leaves columns out of B_E, which cannot lower its smallest singular
        # value: the largest erasures are the hardest, so they are the only ones to try.
        for erased in combinations(range(self.num_experts), self.max_erasures):
            experts, amplification = ", ".join(map(str, erased)), self.amplification(erased)
            if not amplification <= MAX_AMPLIFICATION:
                raise DecodingError(
                    f"the code cannot decode the loss of experts {experts}: its columns for them have a noise "
                    f"amplification of {amplification:.3g}, expected at most {MAX_AMPLIFICATION:.0e}; give every "
                    f"expert a weight and every {self.max_erasures} experts linearly independent columns"
                )

    @property
    def num_coded(self) -> int:
        """R, the number of coded models."""
        return self.matrix.shape[0]

    @property
    def num_experts(self) -> int:
        """N, the number of experts."""
        return self.matrix.shape[1]

    @property
    def max_erasures(self) -> int:
        """The largest number of lost experts that the code decodes: min(R, N)."""
        return min(self.num_coded, self.num_experts)

    def erasures(self) -> list[tuple[int, ...]]:
        """Return every erasure the code promises to decode, smallest first, experts in ascending order."""
        sizes = range(1, self.max_erasures + 1)
        return [erased for size in sizes for erased in combinations(range(self.num_experts), size)]

    def encode(self, outputs: Tensor) -> Tensor:
        """Return what ideal coded models would answer to outputs ``[N, ...]``: ``[R, ...]``, Σ_i matrix[r, i] · f_i."""
        if outputs.shape[0] != self.num_experts:
            told = f"found outputs of {outputs.shape[0]} experts, the code is for {self.num_experts}"
            raise ConfigurationError(f"{told}; give them all, or another code")
        return torch.tensordot(self.matrix.to(outputs), outputs, dims=1)  # type: ignore[no-any-return]

    def amplification(self, erased: Sequence[int]) -> float:
        """Return by how much the linear decoder may enlarge an error of the coded outputs; infinity where it cannot.

        The decoding map of the erasure E is the pseudo-inverse of B_E = ``matrix[:, E]``, so an error e of the coded
        outputs becomes B_E⁺e in the lost experts' outputs and the answer is ‖B_E⁺‖₂ = 1/σ_min(B_E); for one row and one
        lost expert j it is 1/β_j. Dimensionless. Raises as `check_erasure`.
        """
        return _amplification(self.matrix, check_erasure(erased, self.num_experts))

    def worst_amplification(self) -> float:
        """Return the largest noise amplification over all erasures that the code promises to decode."""
        return max(self.amplification(erased) for erased in combinations(range(self.num_experts), self.max_erasures))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Code) and torch.equal(self.matrix, other.matrix)

    def __hash__(self) -> int:
        return hash(tuple(map(tuple, self.matrix.tolist())))

    def __repr__(self) -> str:
        return f"Code({self.matrix.tolist()})"


def check_erasure(erased: Sequence[int], num_experts: int) -> tuple[int, ...]:
    """Return `erased` as a tuple; a DecodingError unless it names different, existing experts, at least one."""
    found = tuple(erased)
    if not found:
        raise DecodingError("found an empty erasure, expected at least one lost expert")
    if len(set(found)) != len(found):
        raise DecodingError(f"the erasure {list(found)} names an expert twice, expected each once")
    if outside := [expert for expert in found if not 0 <= expert < num_experts]:
        raise DecodingError(f"found expert {outside[0]} in the erasure, expected indices from 0 to {num_experts - 1}")
    return found


def decode_linear(matrix: Tensor, coded: Tensor, survivors: Tensor, erased: Sequence[int]) -> Tensor:
    """Solve the code's equations for the lost outputs, in the least-squares sense.

    f̂_E = B_E⁺ (f_c − B_S f_S) with B_E, B_S the columns of the lost and the surviving experts. One row and one lost
    expert j: (f_c − Σ_{i≠j} β_i f_i)/β_j, the paper's decoder (arXiv 2409.01420, section II). Raises DecodingError
    where more experts are lost than coded models answered, or the columns of the lost experts are linearly dependent.

    Args:
        matrix: Rows of the code whose coded models answered ``[R, N]``.
        coded: Their outputs ``[R, B, C]``.
        survivors: Outputs of the experts not in `erased`, in ascending order ``[N − |erased|, B, C]``.
        erased: Indices of the lost experts, in the order of what is returned: ``[|erased|, B, C]`` in `coded`'s type.
    """
    erased = check_erasure(erased, matrix.shape[1])
    present = [expert for expert in range(matrix.shape[1]) if expert not in erased]
    if len(erased) > matrix.shape[0]:
        told = f"{len(erased)} experts are lost but {matrix.shape[0]} coded models answered, expected at least as many"
        raise DecodingError(f"{told}; add rows to the code or use a calibrated decoder")
    weights = matrix.to(torch.float64)
    amplification = _amplification(weights, erased)
    if not amplification <= MAX_AMPLIFICATION:
        told = f"the code's columns for the lost experts {list(erased)} are linearly dependent, noise is amplified"
        raise DecodingError(f"{told} {amplification:.3g}-fold, expected at most {MAX_AMPLIFICATION:.0e}; use another")
    inverse = torch.linalg.pinv(weights[:, list(erased)])
    # One matrix for both parts, made in float64 and rounded once.
    both = torch.cat([inverse, -(inverse @ weights[:, present])], 1).to(coded)
    return torch.tensordot(both, torch.cat([coded, survivors.to(coded)]), dims=1)  # type: ignore[no-any-return]


def _amplification(matrix: Tensor, erased: Sequence[int]) -> float:
    """Return 1/σ_min of the columns `erased` of a matrix ``[R, N]``, infinity where they are dependent."""
    if len(erased) > matrix.shape[0]:
        return float("inf")
    smallest = float(torch.linalg.svdvals(matrix[:, list(erased)])[-1])
    return 1.0 / smallest if smallest > 0 else float("inf")


def _validated(matrix: Sequence[Sequence[float]] | Tensor) -> Tensor:
    try:
        weights = torch.as_tensor(matrix, dtype=torch.float64).detach().cpu().clone()
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"the code is not a matrix of numbers ({error}); give R rows of N weights") from error
    if weights.ndim != 2 or 0 in weights.shape:
        raise ConfigurationError(f"the code has shape {list(weights.shape)}, expected R rows of N weights")
    totals = weights.sum(dim=1, keepdim=True)
    for index, (row, total) in enumerate(zip(weights, totals, strict=True)):
        if not (bool((row >= 0).all()) and abs(float(total) - 1) <= 1e-6):
            told = f"row {index} of the code is {row.tolist()}, which sums to {float(total):.8g}"
            raise ConfigurationError(f"{told}, expected weights of at least 0 that sum to 1; divide it by its sum")
    return weights / totals.where((totals - 1).abs() > 4 * torch.finfo(torch.float64).eps, 1.0)
