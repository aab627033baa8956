"""Categorical and Monte Carlo Fisher diagonals."""

import pytest
import torch
from dense import CLASSES, assert_close, fisher_by_autograd
from torch import nn

from coin.statistics import fisher_diagonal, fisher_sums


@pytest.fixture
def network():
    layers = nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, CLASSES)
    return nn.Sequential(*layers).double()


@pytest.fixture
def inputs():
    return torch.randn(5, 2, 4, 4).double()


def drawn(network, batches, k, generator=None):
    """The Monte Carlo Fisher with k cotangents a sample."""
    torch.manual_seed(1)
    return fisher_diagonal(network, batches, kind="monte_carlo", mc_samples=k, generator=generator)


@pytest.mark.parametrize("kind", ["exact", "categorical"])
def test_kinds_equal_autograd(network, inputs, kind):
    found = fisher_diagonal(network, inputs.split(2), kind=kind)
    assert_close(found, fisher_by_autograd(network, inputs, kind))


def test_monte_carlo_with_all_classes_is_exact(network, inputs):
    assert_close(drawn(network, [inputs], CLASSES), fisher_by_autograd(network, inputs))


def test_monte_carlo_takes_one_cotangent_by_default(network, inputs):
    assert fisher_sums(network, [inputs], kind="monte_carlo").passes == 5 * (1 + 2)


def test_monte_carlo_is_unbiased_and_its_error_falls(network, inputs):
    """Over n draws the mean's error is 1/√n of one draw's; twice as many cotangents at least halve the variance."""
    exact = fisher_diagonal(network, [inputs])["0.weight"]
    generator = torch.Generator().manual_seed(2)
    draws = 150
    errors = {}
    for k in (1, 2):
        found = [drawn(network, [inputs], k, generator)["0.weight"] for _ in range(draws)]
        deviations = torch.stack(found) - exact
        errors[k] = deviations.square().sum((1, 2, 3)).mean()
        bias = deviations.mean(0).square().sum()
        # E bias² = errors / draws; its spread is within a few times that.
        assert bias < 5 * errors[k] / draws
    assert errors[1] > 1e-3 * exact.square().sum()
    # Independent draws would halve the variance; orthogonal ones leave (C − k)/(k (C − 1)) for Gaussian-like rows.
    assert errors[2] < 0.65 * errors[1]


def test_monte_carlo_does_not_depend_on_batch_sizes(network, inputs):
    assert_close(drawn(network, inputs.split([1, 3, 1]), 2), drawn(network, [inputs], 2))
