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


def choose_code(candidates: Iterable[Code], residual_of: Callable[[Code], float]) -> Code:
    """Return the candidate with the smallest residual × worst noise amplification; the first of equals.

    An error e of the coded outputs becomes an error of at most amplification × ‖e‖ in the decoded ones, so the product
    bounds the decoded error over all erasures that the code promises.

    Args:
        candidates: Codes for the same experts.
        residual_of: The root mean square of f_c − Σβ_if_i over calibration data, or a prediction of it; not divided by
            the size of the target, which differs between codes.

    Raises:
        ConfigurationError: There are no candidates.
    """
    scored = [(residual_of(code) * code.worst_amplification(), index, code) for index, code in enumerate(candidates)]
    if not scored:
        raise ConfigurationError("found no candidate codes, expected at least one")
    return min(scored, key=lambda entry: entry[:2])[2]
