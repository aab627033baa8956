"""Ridge regressions against least squares with a row for the ridge, refitted without each sample in turn."""

import pytest
import torch

from coin.coding.ridge import RIDGE_EXPONENTS, fit_blocks, fit_ridge
from coin.errors import NumericalError, StateError

# Of smaller ridges too few digits of a sample's leverage remain to compare the errors.
FIRST_COMPARED = RIDGE_EXPONENTS.index(-4)
SHAPES = {"more samples": (12, 5), "more inputs": (8, 20), "as many": (6, 6), "two": (2, 4)}


def problem(samples, width):
    """Return inputs off zero, and four targets: two noisy ones of the inputs, and two of noise alone."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(samples, width, generator=draw, dtype=torch.float64) + 3
    weights = torch.randn(2, 2, generator=draw, dtype=torch.float64)
    y = torch.randn(samples, 4, generator=draw, dtype=torch.float64)
    y[:, :2] += 3 * x[:, :2] @ weights
    return x, y


def grid_of(x):
    """Return the ridges of the grid, in units of the mean square of the singular values that are not zero."""
    singular_values = torch.linalg.svdvals(x - x.mean(0))
    kept = singular_values > 1e-9 * singular_values[0]
    mean_square = singular_values[kept].square().mean()
    exponents = torch.tensor(RIDGE_EXPONENTS, dtype=torch.float64)
    return mean_square * 10.0**exponents


def predicted(x, y, ridge, new):
    """Return what least squares predict of new inputs, where each coefficient times √λ is to be zero."""
    width = x.shape[1]
    input_mean = x.mean(0)
    target_mean = y.mean(0)
    damping = ridge.sqrt() * torch.eye(width, dtype=x.dtype)
    equations = torch.cat([x - input_mean, damping])
    targets = torch.cat([y - target_mean, y.new_zeros(width, y.shape[1])])
    coefficients = torch.linalg.lstsq(equations, targets).solution
    return (new - input_mean) @ coefficients + target_mean


def errors_left_out(x, y, ridge):
    """Return the error of each sample where it is left out ``[P, T]``."""
    errors = []
    for place in range(len(x)):
        others = torch.arange(len(x)) != place
        prediction = predicted(x[others], y[others], ridge, x[place])
        errors.append(y[place] - prediction)
    return torch.stack(errors)


@pytest.mark.parametrize("shape", SHAPES)
def test_leave_one_out_equals_refitting_and_each_group_has_the_ridge_of_its_least(shape):
    samples, width = SHAPES[shape]
    x, y = problem(samples, width)
    fit = fit_ridge(x, y, groups=2)
    grid = grid_of(x)
    for place in range(FIRST_COMPARED, len(grid)):
        squares = errors_left_out(x, y, grid[place]).square()
        of_groups = squares.reshape(samples, 2, 2).sum(2)
        expected = of_groups.mean(0)
        torch.testing.assert_close(fit.leave_one_out[:, place], expected, rtol=1e-8, atol=1e-10)
    least = fit.leave_one_out.argmin(1)
    torch.testing.assert_close(fit.ridges, grid[least])
    new = x[:3] + 1
    found = fit(new)
    for group, columns in enumerate((slice(0, 2), slice(2, 4))):
        expected = predicted(x, y[:, columns], fit.ridges[group], new)
        torch.testing.assert_close(found[:, columns], expected, rtol=1e-6, atol=1e-8)


def test_groups_of_targets_get_ridges_of_their_own():
    ridges = fit_ridge(*problem(12, 5), groups=2).ridges
    assert ridges[0] < ridges[1]


def test_inputs_that_say_nothing_predict_the_mean():
    x = torch.full((5, 3), 1e4 / 3, dtype=torch.float64)
    y = torch.arange(10, dtype=torch.float64).reshape(5, 2)
    fit = fit_ridge(x, y)
    torch.testing.assert_close(fit(x + 7), y.mean(0).expand(5, 2))
    assert torch.isfinite(fit.leave_one_out).all()


def test_one_sample_and_an_infinity_are_refused():
    x, y = problem(2, 4)
    with pytest.raises(NumericalError, match="found 1 calibration samples"):
        fit_ridge(x[:1], y[:1])
    y[1, 1] = torch.inf
    with pytest.raises(StateError, match="a decoder's calibration is not finite: tensor 'targets'"):
        fit_ridge(x, y)


def test_without_an_intercept_nothing_is_centred():
    x, y = problem(12, 4)
    fit = fit_ridge(x, y, intercept=False)
    damped = x.T @ x + fit.ridges[0] * torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.solve(damped, x.T @ y)
    torch.testing.assert_close(fit.coefficients, expected)
    torch.testing.assert_close(fit(x), x @ expected)


@pytest.mark.parametrize("samples", [40, 120])  # by the blocks' kernels, and by the singular values
def test_blocks_are_fitted_as_if_each_were_divided_by_its_deviation(samples):
    x, y = problem(samples, 80)
    x[:, 3] = 7.0
    constant = torch.full((samples, 10), 1e4 / 3, dtype=torch.float64)
    blocks = [1000 * x[:, :2], x[:, 2:50], 0.01 * x[:, 50:], constant]
    divided = [constant]
    for block in blocks[:3]:
        deviation = block - block.mean(0)
        divided.insert(-1, block / deviation.square().mean().sqrt())
    expected = fit_ridge(torch.cat(divided, 1), y, groups=2)
    targets = torch.stack([y[:, :2], y[:, 2:]])
    fit = fit_blocks(blocks, targets)
    torch.testing.assert_close(fit.ridges, expected.ridges, rtol=1e-10, atol=0)
    found = fit(torch.cat(blocks, 1))
    torch.testing.assert_close(found, expected(torch.cat(divided, 1)), rtol=1e-10, atol=1e-10)
