"""Damped solves."""

import pytest
import torch

from coin.errors import NumericalError
from coin.statistics.solvers import solve_damped


def test_each_group_is_damped_by_its_own_mean():
    scales = torch.tensor([1.0, 100, 0])[:, None, None]  # the last group's inputs are always zero
    rows = torch.randn(3, 9, 4).double() * scales
    pull = torch.randn(3, 2, 4).double() * scales
    gram = rows.mT @ rows
    found = solve_damped(gram, pull, 0.1, "layer")
    for group in (0, 1):
        ridge = 0.1 * gram[group].trace() / 4
        expected = pull[group] @ torch.linalg.inv(gram[group] + ridge * torch.eye(4))
        torch.testing.assert_close(found[group], expected)
    assert not found[2].any()


def test_a_singular_matrix_is_refused_by_name():
    rows = torch.tensor([[[1.0, 2, 3]]]).double()
    with pytest.raises(
        NumericalError, match="the Gram matrix of 'layer' is singular with a damping of 0;"
    ):
        solve_damped(rows.mT @ rows, torch.ones(1, 2, 3).double(), 0.0, "layer")
