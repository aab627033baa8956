"""Ridge regression whose ridge is chosen by exact leave-one-out, from one singular value decomposition."""

from dataclasses import dataclass

import torch
from torch import Tensor

from coin.coding.decomposition import thin_svd
from coin.errors import NumericalError

RIDGE_EXPONENTS = tuple(k / 2 for k in range(-20, 5))
"""The grid: ridges are 10^k times the mean squared singular value of the centred inputs, k = −10, −9.5, … 2."""


@dataclass(frozen=True)
class RidgeFit:
    """An affine map x ↦ (x − input_mean) · coefficients + target_mean, and how it was chosen.

    Args:
        coefficients: ``[D, T]``, float64.
        input_mean: ``[D]``.
        target_mean: ``[T]``.
        ridges: The absolute ridge chosen for each group of targets ``[G]``.
        leave_one_out: Mean squared leave-one-out error per group and grid point ``[G, K]``, summed over the group's
            targets.
    """

    coefficients: Tensor
    input_mean: Tensor
    target_mean: Tensor
    ridges: Tensor
    leave_one_out: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the predictions ``[B, T]`` for `inputs` ``[B, D]``."""
        return (inputs - self.input_mean) @ self.coefficients + self.target_mean


def fit_ridge(inputs: Tensor, targets: Tensor, groups: int = 1) -> RidgeFit:
    """Fit ridge regressions with an unpenalised intercept and the ridge that predicts left-out samples best.

    With X = U S Vᵀ the centred inputs and Y the centred targets, the coefficients for a ridge λ are
    V diag(s/(s² + λ)) UᵀY, the hat matrix is H = 11ᵀ/P + U diag(s²/(s² + λ)) Uᵀ, and refitting without sample i
    leaves exactly the error (y_i − ŷ_i)/(1 − H_ii). So one decomposition serves the whole grid. U and V have at most
    min(P, D) columns: where inputs outnumber samples this is the dual form.

    Source: Golub, Heath and Wahba, *Generalized cross-validation as a method for choosing a good ridge parameter*
    (Technometrics 1979), eq. 1.4 for the leave-one-out (PRESS) identity.

    Args:
        inputs: ``[P, D]``, P ≥ 2, finite.
        targets: ``[P, T]``, finite.
        groups: The targets are this many blocks of equal width, each with a ridge of its own.

    Returns:
        The fit, in float64 on the device of `inputs`.

    Raises:
        NumericalError: There are fewer than two samples, or a value is not finite.
    """
    samples = inputs.shape[0]
    if samples < 2:
        raise NumericalError(f"found {samples} calibration samples, expected at least 2 to choose a ridge")
    x, y = inputs.to(torch.float64), targets.to(torch.float64)
    for what, values in (("inputs", x), ("targets", y)):
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(
                f"the calibration {what} of the decoder hold a NaN or an infinity, expected finite logits"
            )
    input_mean, target_mean = x.mean(0), y.mean(0)
    u, s, vt = thin_svd(x - input_mean)
    # The round-off of centring is not signal: without this cut a constant input gets huge coefficients.
    size = x.abs().amax() if x.numel() else x.new_zeros(())
    kept = s > torch.finfo(torch.float64).eps * max(x.shape) * size * samples**0.5
    u, s, vt = u[:, kept], s[kept], vt[kept]

    y = y - target_mean
    projected = u.T @ y
    outside = y - u @ projected
    leverage_left = (1 - 1 / samples - u.square().sum(1)).clamp_min(0.0)
    scale = s.square().mean() if s.numel() else x.new_ones(())
    grid = scale * 10.0 ** x.new_tensor(RIDGE_EXPONENTS)

    errors = []
    for ridge in grid:
        shrunk = ridge / (s.square() + ridge)
        residual = outside + u @ (shrunk[:, None] * projected)
        slack = leverage_left + u.square() @ shrunk
        left_out = residual / slack[:, None]
        errors.append(left_out.square().reshape(samples, groups, -1).sum(2).mean(0))
    leave_one_out = torch.stack(errors, dim=1)
    ridges = grid[leave_one_out.argmin(1)]

    per_target = ridges.repeat_interleave(y.shape[1] // groups)
    gains = s[:, None] / (s.square()[:, None] + per_target[None, :])
    coefficients = vt.T @ (gains * projected)
    return RidgeFit(coefficients, input_mean, target_mean, ridges, leave_one_out)
