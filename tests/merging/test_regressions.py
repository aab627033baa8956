"""One regression against least squares, and which rows a unit's regression has."""

import math

import pytest
import torch
from near_experts import Apply
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from coin.errors import NumericalError
from coin.merging.rows import LEAST, chosen_places, position_weights
from coin.merging.units import Unit, affine_units
from coin.statistics.solvers import fit_affine


def least_squares(a, r, w, ridge, constants):
    """Return the ridge regression of r [n, O] on a [n, K], with free coefficients of constants [n, T]: [K + T, O]."""
    w = w / w.sum()
    free = constants * w.sqrt()[:, None]
    rows = a * w.sqrt()[:, None]
    # What the constants explain of the inputs is free of charge, so the ridge is that of the rest.
    rest = rows - free @ torch.linalg.lstsq(free, rows).solution
    penalty = (ridge * rest.square().sum() / a.shape[1]).sqrt()
    unknowns = torch.eye(a.shape[1], dtype=a.dtype)
    none = torch.zeros(a.shape[1], constants.shape[1], dtype=a.dtype)
    left = torch.cat([torch.cat([rows, free], 1), torch.cat([penalty * unknowns, none], 1)])
    targets = torch.cat([r * w.sqrt()[:, None], torch.zeros(a.shape[1], r.shape[1], dtype=a.dtype)])
    return torch.linalg.lstsq(left, targets, driver="gelsd").solution


@pytest.mark.parametrize(("rows", "unknowns"), [(40, 6), (15, 20), (700, 600)])
@pytest.mark.parametrize("constant", ["none", "one", "one a task"])
def test_a_regression_is_that_of_least_squares(rows, unknowns, constant):
    draw = torch.Generator().manual_seed(rows)
    tasks = torch.arange(rows) % 3
    a = torch.randn(2, rows, unknowns, generator=draw, dtype=torch.float64) + tasks[:, None]
    r = torch.randn(2, rows, 3, generator=draw, dtype=torch.float64) + 2 * tasks[:, None]
    w = torch.rand(rows, generator=draw, dtype=torch.float64) + 0.1
    constants = torch.zeros(rows, 1, dtype=torch.float64)
    of_task = None
    if constant == "one":
        constants = torch.ones(rows, 1, dtype=torch.float64)
    elif constant == "one a task":
        constants = F.one_hot(tasks).double()
        of_task = tasks
    step, shift = fit_affine(a, r, w, 0.2, intercept=constant != "none", tasks=of_task)
    for group in range(2):
        expected = least_squares(a[group], r[group], w, 0.2, constants)
        assert_close(step[group].T, expected[:unknowns], rtol=1e-7, atol=1e-9)
        if constant == "one":
            assert_close(shift[group], expected[unknowns], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("of_task", [None, torch.arange(2).repeat_interleave(150)])
def test_constant_inputs_get_no_coefficients_from_rounding(of_task):
    draw = torch.Generator().manual_seed(0)
    constant = 30.1 * torch.randn(1, 1, 6, generator=draw).expand(1, 300, 6).clone()
    if of_task is not None:
        constant[:, 150:] *= -1  # the mean over all is zero, and each task's is not
    r = torch.randn(1, 300, 2, generator=draw)
    w = torch.rand(300, generator=draw)
    step, shift = fit_affine(constant, r, w, 0.1, tasks=of_task)
    assert not step.any()
    if of_task is None:
        expected = w.double() @ r[0].double() / w.double().sum()
        assert_close(shift[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "message"), [(torch.inf, "not finite"), (1e30, "so large that squares overflow")]
)
def test_rows_that_cannot_be_squared_are_refused(size, message):
    a = torch.tensor([1.0, -1.0, 2.0]).view(1, 3, 1) * size
    with pytest.raises(NumericalError, match=message):
        fit_affine(a, a, torch.ones(3).double(), 0.1)


def test_a_ridge_that_is_too_small_is_refused():
    draw = torch.Generator().manual_seed(0)
    few = torch.randn(1, 200, 3, generator=draw)
    dependent = few @ torch.randn(1, 3, 40, generator=draw)
    with pytest.raises(
        NumericalError, match="too nearly dependent for this ridge; give a larger ridge"
    ):
        fit_affine(dependent, few, torch.ones(200), 1e-10)


# Rows


def places_of(positions, unknowns, outputs=1, budget=math.inf, **weights):
    """Return the positions in 100 samples that are rows of one unit's regression."""
    unit = Unit("w", None, None, (positions, outputs), 1, outputs, unknowns)
    cpu = torch.device("cpu")
    return chosen_places([unit], torch.arange(100), weights, cpu, budget)["w"]


def test_all_positions_are_rows_where_there_are_few():
    assert places_of(3, 10) is None  # 300 rows, and 256 are wanted: as many of every sample


@pytest.mark.parametrize(
    ("unknowns", "outputs", "each"),
    [
        (100, 100, 11),  # half of the time of the layer's calls
        (100, 25, 8),  # 8 for every unknown
        (100, 2, 5),  # what 4 times the calls' time pays for
        (4000, 100, 15),  # the same of fewer rows than unknowns
        (25, 1, 3),  # 256 in all
    ],
)
def test_so_many_positions_are_rows_as_their_time_allows(unknowns, outputs, each):
    assert places_of(64, unknowns, outputs).shape == (100, each)


def test_where_outputs_do_not_fit_no_rows_are_added_for_being_cheap():
    plenty = places_of(1000, 4, 64).shape[1]
    few = places_of(1000, 4, 64, budget=0).shape[1]
    assert LEAST / 100 <= few < plenty


def test_places_are_one_of_each_stretch_and_as_often_as_they_weigh():
    places = places_of(1000, 500, 500)
    count = places.shape[1]
    stretches = places * count / 1000 - torch.arange(count)
    assert float(stretches.min()) > -count / 1000
    assert float(stretches.max()) < 1
    weight = torch.full((1000,), 0.5)
    weight[7] = 500.5  # of 1000 in all
    drawn = places_of(1000, 50, 50, w=weight)
    of_seven = (drawn == 7).sum(1) / drawn.shape[1]
    assert float((of_seven - 0.5).abs().max()) < 1.5 / drawn.shape[1]


def test_positions_that_outputs_do_not_read_weigh_half_and_without_outputs_none_weigh():
    first_token = Apply(lambda x: x[:, 0])
    layers = (
        nn.Linear(4, 6),
        nn.ReLU(inplace=True),
        nn.Linear(6, 5),
        first_token,
        nn.Linear(5, 3),
    )
    network = nn.Sequential(*layers).double().eval()
    x = torch.randn(10, 7, 4, dtype=torch.float64)
    units = affine_units(network, x).units
    weights = position_weights(network, units, x)
    expected = torch.full((7,), 0.5, dtype=torch.float64)
    expected[0] += 7 / 2
    assert weights.keys() == {"0.weight", "2.weight"}
    for weight in weights.values():
        assert_close(weight, expected)
    network[4].weight.data.zero_()
    assert position_weights(network, units, x) == {}
