import pytest
import torch

from coin.coding.ridge import RIDGE_EXPONENTS, fit_blocks, fit_ridge
from coin.errors import NumericalError, StateError


def problem(samples, width, targets=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64) + 3
    y = x[:, :2] @ torch.randn(2, targets, generator=generator, dtype=torch.float64)
    return x, y + torch.randn(samples, targets, generator=generator, dtype=torch.float64)


def grid_of(x):
    squares = torch.linalg.svdvals(x - x.mean(0)).square()
    return squares[squares > 1e-18 * squares[0]].mean() * 10.0 ** torch.tensor(RIDGE_EXPONENTS, dtype=torch.float64)


def primal(x, y, ridge):
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    gram = centred.T @ centred + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    return mean_x, mean_y, torch.linalg.solve(gram, centred.T @ (y - mean_y))


def brute_force_errors(x, y, ridge):
    errors = []
    for left_out in range(len(x)):
        rest = [i for i in range(len(x)) if i != left_out]
        mean_x, mean_y, coefficients = primal(x[rest], y[rest], ridge)
        errors.append(y[left_out] - mean_y - (x[left_out] - mean_x) @ coefficients)
    return torch.stack(errors)


@pytest.mark.parametrize(("samples", "width"), [(12, 5), (8, 20), (6, 6)])
def test_leave_one_out_equals_refitting(samples, width):
    x, y = problem(samples, width)
    fit = fit_ridge(x, y, groups=2)
    grid = grid_of(x)
    # Below 10⁻⁴ the reference's own normal equations lose too many digits to be compared with.
    for index in [k for k, exponent in enumerate(RIDGE_EXPONENTS) if exponent >= -4]:
        errors = brute_force_errors(x, y, grid[index]).square()
        expected = torch.stack([errors[:, :2].sum(1).mean(), errors[:, 2:].sum(1).mean()])
        torch.testing.assert_close(fit.leave_one_out[:, index], expected, rtol=1e-8, atol=1e-10)


def test_each_group_of_targets_gets_its_own_best_ridge():
    x, y = problem(30, 6)
    y[:, 2:] = torch.randn(30, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fit = fit_ridge(x, y, groups=2)
    torch.testing.assert_close(fit.ridges, grid_of(x)[fit.leave_one_out.argmin(1)])
    assert fit.ridges[1] > fit.ridges[0]
    for group, columns in enumerate((slice(0, 2), slice(2, 4))):
        alone = fit_ridge(x, y[:, columns])
        torch.testing.assert_close(fit.ridges[group], alone.ridges[0])
        torch.testing.assert_close(fit.coefficients[:, columns], alone.coefficients)


@pytest.mark.parametrize(("samples", "width", "seed"), [(40, 5, 0), (10, 60, 2)])
def test_the_map_is_that_of_the_normal_equations(samples, width, seed):
    x, y = problem(samples, width, seed=seed)
    fit = fit_ridge(x, y)
    ridge = fit.ridges[0]
    assert RIDGE_EXPONENTS[int(fit.leave_one_out.argmin())] >= -4  # below, the reference loses too many digits
    mean_x, mean_y, coefficients = primal(x, y, ridge)
    torch.testing.assert_close(fit.coefficients, coefficients, rtol=1e-6, atol=1e-8)
    new = torch.randn(3, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(fit(new), (new - mean_x) @ coefficients + mean_y, rtol=1e-6, atol=1e-8)


def test_inputs_that_say_nothing_predict_the_mean():
    x = torch.full((5, 3), 1e4 / 3, dtype=torch.float64)
    y = torch.arange(10, dtype=torch.float64).reshape(5, 2)
    fit = fit_ridge(x, y)
    torch.testing.assert_close(fit(x + 7), y.mean(0).expand(5, 2))
    assert torch.isfinite(fit.leave_one_out).all()


def test_two_samples_are_enough_and_one_is_not_nor_is_an_infinity():
    x, y = problem(2, 4)
    fit = fit_ridge(x, y)
    assert torch.isfinite(fit.coefficients).all()
    assert torch.isfinite(fit.leave_one_out).all()
    with pytest.raises(NumericalError, match="found 1 calibration samples"):
        fit_ridge(x[:1], y[:1])
    y[1, 1] = float("inf")
    with pytest.raises(StateError, match="a decoder's calibration is not finite: tensor 'targets'"):
        fit_ridge(x, y)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("samples", [40, 120])
def test_scaled_blocks_are_fitted_by_their_kernels_as_by_the_singular_values(dead, groups, samples):
    x, y = problem(samples, 90)
    if dead:  # a constant column, and a block that says nothing
        x[:, 3] = 7.0
        x[:, 80:] = 1e4 / 3
    blocks = [1000 * x[:, :2], x[:, 2:50], 0.01 * x[:, 50:80], x[:, 80:]]
    targets = y.reshape(samples, groups, -1).transpose(0, 1)
    fit = fit_blocks(blocks, targets)
    deviations = [(block - block.mean(0)).square().mean().sqrt() for block in blocks]
    scales = [deviation if deviation > 1e-9 else 1.0 for deviation in deviations]
    divided = torch.cat([block / scale for block, scale in zip(blocks, scales, strict=True)], 1)
    reference = fit_ridge(divided, y, groups)
    torch.testing.assert_close(fit.ridges, reference.ridges, rtol=1e-10, atol=0)
    torch.testing.assert_close(fit(torch.cat(blocks, 1)), reference(divided), rtol=1e-10, atol=1e-10)


def test_without_an_intercept_nothing_is_centred():
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(12, 4, generator=draw, dtype=torch.float64) + 2
    y = x @ torch.randn(4, 2, generator=draw, dtype=torch.float64) + 5
    y += torch.randn(12, 2, generator=draw, dtype=torch.float64)
    fit = fit_ridge(x, y, intercept=False)
    assert not fit.input_mean.any()
    assert not fit.target_mean.any()
    damped = x.T @ x + fit.ridges[0] * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(fit.coefficients, torch.linalg.solve(damped, x.T @ y))
