import pytest
import torch

from coin.errors import NumericalError
from coin.statistics.solvers import solve_in_sample_space

DAMPINGS = torch.logspace(-6, 3, 10, dtype=torch.float64)


def problem(samples=10, outputs=3, parameters=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(samples * outputs, parameters, generator=generator, dtype=torch.float64)
    metric = torch.rand(parameters, generator=generator, dtype=torch.float64) + 0.1
    truth = torch.randn(parameters, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples * outputs, generator=generator, dtype=torch.float64)
    return jacobian, metric, (jacobian @ truth + noise).reshape(samples, outputs)


def dense_step(jacobian, metric, residual, training, damping):
    """The normal equations in parameter space."""
    rows = training.repeat_interleave(residual.shape[1])
    j, r = jacobian[rows], residual.flatten()[rows]
    count = int(training.sum())
    return torch.linalg.solve(j.T @ j / count + damping * torch.diag(metric), j.T @ r / count)


def product_of(jacobian, metric, shape):
    return lambda u: (jacobian @ ((jacobian.T @ u.flatten()) / metric)).reshape(shape)


@pytest.mark.parametrize("parameters", [12, 200])
def test_the_choice_is_the_best_dense_solution(parameters, monkeypatch):
    monkeypatch.setattr("coin.statistics.solvers._PATIENCE", 60)
    jacobian, metric, residual = problem(parameters=parameters)
    training = torch.arange(10) % 5 != 4
    product = product_of(jacobian, metric, residual.shape)
    solution = solve_in_sample_space(product, residual, training, DAMPINGS, max_iterations=60)
    assert (solution is None) == (parameters == 200)  # no solution helps where there are so few samples
    solution = torch.zeros_like(residual) if solution is None else solution
    held_out = (~training).repeat_interleave(3)
    errors = {}
    for damping in DAMPINGS:
        step = dense_step(jacobian, metric, residual, training, damping)
        errors[float(damping)] = float((residual.flatten() - jacobian @ step)[held_out].square().sum())
    assert bool((solution[~training] == 0).all())
    step = (jacobian.T @ solution.flatten()) / metric
    actual = float((residual.flatten() - jacobian @ step)[held_out].square().sum())
    # Truncation regularises too, so the choice is at least as good as every converged solution.
    assert actual <= min(errors.values()) * (1 + 1e-8)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_truncation_is_the_damped_solution_within_the_krylov_space(iterations):
    jacobian, metric, residual = problem(parameters=12)
    training = torch.arange(10) % 5 != 4
    rows = training.repeat_interleave(3)
    product = product_of(jacobian, metric, residual.shape)
    solution = solve_in_sample_space(product, residual, training, torch.tensor([2.0]), iterations)
    kernel = (jacobian[rows] / metric) @ jacobian[rows].T
    powers = [residual.flatten()[rows]]
    for _ in range(iterations - 1):
        powers.append(kernel @ powers[-1] / kernel.norm())
    basis = torch.linalg.qr(torch.stack(powers, 1)).Q
    within = torch.linalg.solve(
        basis.T @ kernel @ basis + 2.0 * 8 * torch.eye(iterations).double(), basis.T @ residual.flatten()[rows]
    )
    torch.testing.assert_close(solution[training].flatten(), basis @ within, rtol=1e-8, atol=1e-10)


def test_held_out_errors_only_judge():
    jacobian, metric, residual = problem(parameters=12)
    training = torch.arange(10) % 5 != 4
    product = product_of(jacobian, metric, residual.shape)
    changed = residual.clone()
    changed[~training] *= 1.1
    one, two = (solve_in_sample_space(product, r, training, torch.tensor([1.0]), 1) for r in (residual, changed))
    assert one is not None
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_nothing_to_fit_is_no_step():
    assert solve_in_sample_space(lambda u: u, torch.zeros(4, 2), torch.arange(4) < 3, DAMPINGS, 5) is None


def test_a_product_that_is_not_finite_is_an_error():
    with pytest.raises(NumericalError, match="not finite"):
        solve_in_sample_space(lambda u: u * torch.nan, torch.ones(4, 2), torch.arange(4) < 3, DAMPINGS, 5)
