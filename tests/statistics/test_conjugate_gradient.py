"""Conjugate gradients against a direct solve."""

import pytest
import torch
from torch import Tensor

from coin.errors import ConfigurationError, NumericalError
from coin.statistics import conjugate_gradient

State = dict[str, Tensor]


def split(x: Tensor) -> State:
    return {"a": x[:6].view(2, 3).clone(), "b": x[6:].clone()}


def joined(state: State) -> Tensor:
    return torch.cat([state["a"].flatten(), state["b"]])


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
    diagonal = matrix.diagonal()
    found = conjugate_gradient(
        lambda v: split(matrix @ joined(v)), split(right),
        preconditioner=lambda r: split(joined(r) / diagonal), tolerance=1e-13, max_steps=60,
    )  # fmt: skip
    assert found.converged
    torch.testing.assert_close(joined(found.solution), torch.linalg.solve(matrix, right), rtol=1e-8, atol=1e-12)
    assert found.residuals[0] == pytest.approx(1)
    assert len(found.residuals) == found.steps + 1
    true = torch.linalg.vector_norm(right - matrix @ joined(found.solution)) / torch.linalg.vector_norm(right)
    assert true < 1e-10


def test_the_preconditioner_pays(matrix: Tensor, right: Tensor) -> None:
    def operator(v: State) -> State:
        return split(matrix @ joined(v))

    plain = conjugate_gradient(operator, split(right), tolerance=1e-10, max_steps=500)
    helped = conjugate_gradient(
        operator, split(right), preconditioner=lambda r: split(joined(r) / matrix.diagonal()), tolerance=1e-10
    )
    assert helped.converged
    assert helped.steps <= 12 < plain.steps


def test_stops_at_the_limit_and_says_so(matrix: Tensor, right: Tensor) -> None:
    found = conjugate_gradient(lambda v: split(matrix @ joined(v)), split(right), max_steps=2, tolerance=1e-12)
    assert (found.steps, found.converged) == (2, False)


def test_nothing_to_solve(matrix: Tensor) -> None:
    found = conjugate_gradient(lambda v: split(matrix @ joined(v)), split(torch.zeros(10, dtype=torch.float64)))
    assert found.converged
    assert not joined(found.solution).any()


def test_an_indefinite_operator_is_refused(right: Tensor) -> None:
    with pytest.raises(NumericalError, match="raise the damping"):
        conjugate_gradient(lambda v: {key: -value for key, value in v.items()}, split(right))


def test_bad_options(right: Tensor) -> None:
    with pytest.raises(ConfigurationError, match="max_steps=-1"):
        conjugate_gradient(dict, split(right), max_steps=-1)
