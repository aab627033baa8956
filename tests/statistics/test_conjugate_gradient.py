"""Conjugate gradients against a direct solve."""

import pytest
import torch
from torch import Tensor

from coin.errors import NumericalError
from coin.files.tensors import flat, shaped
from coin.statistics.solvers import conjugate_gradient


@pytest.fixture
def matrix() -> Tensor:
    """Positive definite and badly scaled."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-2, 2, 10, dtype=torch.float64)
    return scale[:, None] * (root @ root.T / 10 + torch.eye(10)) * scale


@pytest.fixture
def right() -> Tensor:
    return torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_solves_like_a_direct_solver(matrix: Tensor, right: Tensor) -> None:
    x, residuals = conjugate_gradient(matrix.mv, right, matrix.diagonal(), 60, 1e-13)
    assert residuals[0] == pytest.approx(1)
    assert residuals[-1] <= 1e-13 < min(residuals[:-1])
    torch.testing.assert_close(x, torch.linalg.solve(matrix, right), rtol=1e-8, atol=1e-12)
    true = torch.linalg.vector_norm(right - matrix @ x) / torch.linalg.vector_norm(right)
    assert true < 1e-10


def test_the_residuals_are_those_of_every_step(matrix: Tensor, right: Tensor) -> None:
    for steps in range(4):
        x, residuals = conjugate_gradient(matrix.mv, right, matrix.diagonal(), steps, 1e-12)
        assert len(residuals) == steps + 1
        assert residuals[-1] == pytest.approx(float((right - matrix @ x).norm() / right.norm()), rel=1e-9)


def test_the_preconditioner_pays(matrix: Tensor, right: Tensor) -> None:
    _, plain = conjugate_gradient(matrix.mv, right, torch.ones_like(right), 500, 1e-10)
    _, helped = conjugate_gradient(matrix.mv, right, matrix.diagonal(), 100, 1e-10)
    assert helped[-1] <= 1e-10
    assert len(helped) <= 13 < len(plain)


def test_nothing_to_solve(matrix: Tensor) -> None:
    x, residuals = conjugate_gradient(matrix.mv, torch.zeros(10, dtype=torch.float64), matrix.diagonal(), 100, 1e-6)
    assert residuals == [0]
    assert not x.any()


@pytest.mark.parametrize("factor", [-1, 0, torch.nan, torch.inf])
def test_a_curvature_that_is_not_positive_or_not_finite_is_refused(factor: float, right: Tensor) -> None:
    with pytest.raises(NumericalError, match=r"at step 1, expected .* raise the damping"):
        conjugate_gradient(lambda v: factor * v, right, torch.ones_like(right), 100, 1e-6)
    with pytest.raises(NumericalError, match=r"at step 1, expected .* raise the damping"):
        conjugate_gradient(lambda v: v, right / 0, torch.ones_like(right), 100, 1e-6)


def test_tensors_become_a_vector_and_again_themselves() -> None:
    state = {"a": torch.randn(2, 3).T, "b": torch.randn(4).double()}
    again = shaped(flat(state), state)
    for name, tensor in state.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0)
