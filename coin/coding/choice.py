"""Choosing a code by what it will do to decoded outputs."""

from collections.abc import Callable, Iterable
from itertools import combinations, pairwise

from coin.coding.code import Code
from coin.errors import ConfigurationError


def simplex_codes(num_experts: int, resolution: int) -> list[Code]:
    """Return all codes of one row whose weights are positive multiples of 1/resolution.

    There are (resolution − 1 choose N − 1) of them: 9 for two experts at resolution 10, 36 for three.

    Raises:
        ConfigurationError: `resolution` is less than N, so that no such row exists.
    """
    if not 1 <= num_experts <= resolution:
        raise ConfigurationError(f"found resolution {resolution} for {num_experts} experts, expected at least as many")
    codes = []
    for cuts in combinations(range(1, resolution), num_experts - 1):
        edges = (0, *cuts, resolution)
        codes.append(Code([[(high - low) / resolution for low, high in pairwise(edges)]]))
    return codes


def decoded_error_bound(code: Code, residual: float) -> float:
    """Return residual × worst noise amplification, by which codes are chosen.

    An error e of the coded outputs becomes an error of at most amplification × ‖e‖ in the decoded ones, so the product
    bounds the decoded error over all erasures that the code promises.

    Args:
        code: The code.
        residual: The root mean square of f_c − Σβ_if_i over calibration data, or a prediction of it; not divided by
            the size of the target, which differs between codes.
    """
    return residual * code.worst_amplification()


def choose_code(candidates: Iterable[Code], residual_of: Callable[[Code], float]) -> Code:
    """Return the candidate with the smallest `decoded_error_bound`; the first of equals.

    Args:
        candidates: Codes for the same experts.
        residual_of: A code's residual, as `decoded_error_bound` wants it.

    Raises:
        ConfigurationError: There are no candidates.
    """
    codes = list(candidates)
    if not codes:
        raise ConfigurationError("found no candidate codes, expected at least one")
    return min(codes, key=lambda code: decoded_error_bound(code, residual_of(code)))
