"""Ridge regressions against normal equations, refitted without each sample in turn."""

import pytest
import torch

from coin.coding.ridge import RIDGE_EXPONENTS, fit_blocks, fit_ridge
from coin.errors import NumericalError, StateError

# Below 1e-4 the references' normal equations lose too many digits to be compared with.
COMPARED = [place for place, exponent in enumerate(RIDGE_EXPONENTS) if exponent >= -4]
SHAPES = {"more samples": (12, 5), "more inputs": (8, 20), "as many": (6, 6)}


def problem(samples, width, seed=0):
    """Return inputs off zero, and four noisy targets of them."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, width, generator=draw, dtype=torch.float64) + 3
    weights = torch.randn(2, 4, generator=draw, dtype=torch.float64)
    noise = torch.randn(samples, 4, generator=draw, dtype=torch.float64)
    return x, x[:, :2] @ weights + noise


def grid_of(x):
    """Return the ridges of the grid, in units of the mean square of the singular values that are not zero."""
    squares = torch.linalg.svdvals(x - x.mean(0)).square()
    mean = squares[squares > 1e-18 * squares[0]].mean()
    return mean * 10.0 ** torch.tensor(RIDGE_EXPONENTS, dtype=torch.float64)


def predicted(x, y, ridge, new):
    """Return what the normal equations predict of new inputs."""
    centred = x - x.mean(0)
    gram = centred.T @ centred + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    coefficients = torch.linalg.solve(gram, centred.T @ (y - y.mean(0)))
    return (new - x.mean(0)) @ coefficients + y.mean(0)


def squares_left_out(x, y, ridge):
    """Return the squared errors of each sample where it is left out ``[P, T]``."""
    errors = []
    for place in range(len(x)):
        rest = [other for other in range(len(x)) if other != place]
        errors.append(y[place] - predicted(x[rest], y[rest], ridge, x[place]))
    return torch.stack(errors).square()


@pytest.mark.parametrize("shape", SHAPES)
def test_leave_one_out_equals_refitting_and_its_least_is_taken(shape):
    x, y = problem(*SHAPES[shape])
    fit = fit_ridge(x, y, groups=2)
    grid = grid_of(x)
    for place in COMPARED:
        squares = squares_left_out(x, y, grid[place])
        expected = torch.stack([squares[:, :2].sum(1).mean(), squares[:, 2:].sum(1).mean()])
        torch.testing.assert_close(fit.leave_one_out[:, place], expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(fit.ridges, grid[fit.leave_one_out.argmin(1)])


@pytest.mark.parametrize(("samples", "width", "seed"), [(40, 5, 0), (10, 60, 2)])
def test_the_map_is_that_of_the_normal_equations(samples, width, seed):
    x, y = problem(samples, width, seed)
    fit = fit_ridge(x, y)
    assert int(fit.leave_one_out.argmin()) in COMPARED
    new = x[:3] + 1
    expected = predicted(x, y, fit.ridges[0], new)
    torch.testing.assert_close(fit(new), expected, rtol=1e-6, atol=1e-8)


def test_each_group_of_targets_gets_the_ridge_that_it_has_alone():
    x, y = problem(30, 6)
    y[:, 2:] = torch.randn(30, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fit = fit_ridge(x, y, groups=2)
    assert fit.ridges[1] > fit.ridges[0]
    for group, columns in enumerate((slice(0, 2), slice(2, 4))):
        alone = fit_ridge(x, y[:, columns])
        torch.testing.assert_close(fit.ridges[group], alone.ridges[0])
        torch.testing.assert_close(fit.coefficients[:, columns], alone.coefficients)


def test_inputs_that_say_nothing_predict_the_mean():
    x = torch.full((5, 3), 1e4 / 3, dtype=torch.float64)
    y = torch.arange(10, dtype=torch.float64).reshape(5, 2)
    fit = fit_ridge(x, y)
    torch.testing.assert_close(fit(x + 7), y.mean(0).expand(5, 2))
    assert torch.isfinite(fit.leave_one_out).all()


def test_two_samples_are_enough():
    x, y = problem(2, 4)
    fit = fit_ridge(x, y)
    assert torch.isfinite(fit.coefficients).all()
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
    fit = fit_ridge(x, y + 5, intercept=False)
    damped = x.T @ x + fit.ridges[0] * torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.solve(damped, x.T @ (y + 5))
    torch.testing.assert_close(fit.coefficients, expected)
    torch.testing.assert_close(fit(x), x @ expected)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("samples", [40, 120])  # by the blocks' kernels, and by the singular values
def test_blocks_are_fitted_as_if_each_were_divided_by_its_deviation(dead, groups, samples):
    x, y = problem(samples, 90)
    if dead:
        x[:, 3] = 7.0  # a column
        x[:, 80:] = 1e4 / 3  # a block
    blocks = [1000 * x[:, :2], x[:, 2:50], 0.01 * x[:, 50:80], x[:, 80:]]
    divided = []
    for block in blocks:
        deviation = (block - block.mean(0)).square().mean().sqrt()
        divided.append(block / deviation if deviation > 1e-9 else block)
    expected = fit_ridge(torch.cat(divided, 1), y, groups)
    fit = fit_blocks(blocks, y.reshape(samples, groups, -1).transpose(0, 1))
    torch.testing.assert_close(fit.ridges, expected.ridges, rtol=1e-10, atol=0)
    found = fit(torch.cat(blocks, 1))
    torch.testing.assert_close(found, expected(torch.cat(divided, 1)), rtol=1e-10, atol=1e-10)
