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
"""How many largest erasures a code may have: all are checked."""


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
        count = math.comb(self.num_experts, self.max_erasures)
        if count > MAX_ERASURES:
            raise ConfigurationError(
                f"found {count} erasures of {self.max_erasures} of {self.num_experts} experts, expected at most "
                f"{MAX_ERASURES}, each of which is checked; use fewer rows"
            )
        for erased in self._largest_erasures():
            check_decodable(self.matrix, erased)

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
        experts = range(self.num_experts)
        found: list[tuple[int, ...]] = []
        for size in range(1, self.max_erasures + 1):
            found += combinations(experts, size)
        return found

    def _largest_erasures(self) -> list[tuple[int, ...]]:
        """Return the hardest erasures: one of fewer experts has fewer columns, whose smallest σ is no lower."""
        experts = range(self.num_experts)
        return list(combinations(experts, self.max_erasures))

    def encode(self, outputs: Tensor) -> Tensor:
        """Return what ideal coded models would answer to outputs ``[N, ...]``: ``[R, ...]``, Σ_i matrix[r, i] · f_i."""
        weights = self.matrix.to(outputs)
        return torch.tensordot(weights, outputs, dims=1)  # type: ignore[no-any-return]

    def amplification(self, erased: Sequence[int]) -> float:
        """Return by how much the linear decoder may enlarge an error of the coded outputs; infinity where it cannot.

        The decoding map of the erasure E is the pseudo-inverse of B_E = ``matrix[:, E]``, so an error e of the coded
        outputs becomes B_E⁺e in the lost experts' outputs and the answer is ‖B_E⁺‖₂ = 1/σ_min(B_E); for one row and one
        lost expert j it is 1/β_j. Dimensionless. Raises as `check_erasure`.
        """
        lost = check_erasure(erased, self.num_experts)
        return _amplification(self.matrix, lost)

    def worst_amplification(self) -> float:
        """Return the largest noise amplification over all erasures that the code promises to decode."""
        every = [_amplification(self.matrix, erased) for erased in self._largest_erasures()]
        return max(every)

    def __repr__(self) -> str:
        return f"Code({self.matrix.tolist()})"


def check_erasure(erased: Sequence[int], num_experts: int) -> tuple[int, ...]:
    """Return `erased` as a tuple; a DecodingError unless it names different, existing experts, at least one."""
    found = tuple(erased)
    distinct = set(found)
    repeats = len(distinct) < len(found)
    exist = distinct <= set(range(num_experts))
    if not found or repeats or not exist:
        expected = f"different experts, at least one, with indices from 0 to {num_experts - 1}"
        raise DecodingError(f"found the erasure {list(found)}, expected {expected}")
    return found


def check_decodable(matrix: Tensor, erased: Sequence[int]) -> None:
    """Raise DecodingError where rows of a code ``[R, N]`` amplify noise too much to decode the loss of experts."""
    amplification = _amplification(matrix, erased)
    if not amplification <= MAX_AMPLIFICATION:
        lost = ", ".join(map(str, erased))
        raise DecodingError(
            f"the code cannot decode the loss of experts {lost} with {len(matrix)} coded models: it would amplify "
            f"noise {amplification:.3g}-fold, expected at most {MAX_AMPLIFICATION:.0e}; give it more rows, a weight "
            "for every expert and linearly independent columns, or use a calibrated decoder"
        )


def decode_linear(
    matrix: Tensor,
    coded: Tensor,
    survivors: Tensor,
    erased: Sequence[int],
) -> Tensor:
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
    num_experts = matrix.shape[1]
    erased = check_erasure(erased, num_experts)
    weights = matrix.to(torch.float64)
    check_decodable(weights, erased)
    present = [expert for expert in range(num_experts) if expert not in erased]
    inverse = torch.linalg.pinv(weights[:, list(erased)])  # [|erased|, R]
    # One matrix for both parts, made in float64 and rounded once.
    of_survivors = -(inverse @ weights[:, present])  # [|erased|, N − |erased|]
    both = torch.cat([inverse, of_survivors], 1).to(coded)
    outputs = torch.cat([coded, survivors.to(coded)])
    return torch.tensordot(both, outputs, dims=1)  # type: ignore[no-any-return]


def _amplification(matrix: Tensor, erased: Sequence[int]) -> float:
    """Return 1/σ_min of the columns `erased` of a matrix ``[R, N]``, infinity where they are dependent."""
    if len(erased) > matrix.shape[0]:
        return math.inf
    singular_values = torch.linalg.svdvals(matrix[:, list(erased)])
    smallest = float(singular_values[-1])
    return 1.0 / smallest if smallest > 0 else math.inf


def _validated(matrix: Sequence[Sequence[float]] | Tensor) -> Tensor:
    """Return coding weights in float64 with rows that sum to 1; a ConfigurationError where they are none."""
    try:
        weights = torch.as_tensor(matrix, dtype=torch.float64).detach().cpu().clone()
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the code is not a matrix of numbers ({error}); give R rows of N weights"
        ) from error
    if weights.ndim != 2 or 0 in weights.shape:
        raise ConfigurationError(
            f"the code has shape {list(weights.shape)}, expected R rows of N weights"
        )
    # One after the other: the last bits of a vectorised sum differ by processor, and keys hold the matrix.
    totals = weights.cumsum(dim=1)[:, -1:]  # [R, 1]
    for index, row in enumerate(weights):
        total = float(totals[index])
        is_positive = bool((row >= 0).all())
        sums_to_one = abs(total - 1) <= 1e-6
        if not (is_positive and sums_to_one):
            found = f"row {index} of the code is {row.tolist()}, which sums to {total:.8g}"
            raise ConfigurationError(
                f"{found}, expected weights of at least 0 that sum to 1; divide it by its sum"
            )
    rounding = 4 * torch.finfo(torch.float64).eps
    is_off = (totals - 1).abs() > rounding
    return weights / totals.where(is_off, 1.0)
