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

CONSTANTS = {
    "none": lambda tasks: torch.zeros(len(tasks), 1),
    "one": lambda tasks: torch.ones(len(tasks), 1),
    "one a task": F.one_hot,
}


@pytest.mark.parametrize(("rows", "unknowns"), [(40, 6), (15, 20), (700, 600)])
@pytest.mark.parametrize("kind", CONSTANTS)
def test_a_regression_fulfils_the_normal_equations(rows, unknowns, kind):
    """Σ w (r − a Δᵀ − c) a = λ Δ, with λ relative to what free constants leave of the inputs."""
    draw = torch.Generator().manual_seed(rows)
    tasks = torch.arange(rows) % 3
    a = torch.randn(2, rows, unknowns, generator=draw, dtype=torch.float64) + tasks[:, None]
    r = torch.randn(2, rows, 3, generator=draw, dtype=torch.float64) + 2 * tasks[:, None]
    w = torch.rand(rows, generator=draw, dtype=torch.float64) + 0.1
    of_task = tasks if kind == "one a task" else None
    step, shift = fit_affine(a, r, w, 0.2, intercept=kind != "none", tasks=of_task)
    w = w / w.sum()
    constants = CONSTANTS[kind](tasks).double()
    inverse = torch.linalg.pinv(constants.T @ (w[:, None] * constants))
    explained = constants @ inverse @ (constants.T * w)  # [rows, rows]
    rest = a - explained @ a
    error = r - a @ step.mT
    error_rest = error - explained @ error
    variance = (w[:, None] * rest.square()).sum(1).mean(1)
    pull = (w[:, None] * error_rest).mT @ rest
    assert_close(pull, 0.2 * variance[:, None, None] * step, rtol=1e-7, atol=1e-10)
    if kind == "one":
        assert_close(shift, w @ error, rtol=1e-7, atol=1e-9)


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
