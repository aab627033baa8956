"""Codes: which are refused, what they encode, how much they amplify noise, and the ready-made ones."""

import math
from itertools import accumulate, combinations

import numpy as np
import pytest
import torch

from coin.coding import Code, convex, decode_linear
from coin.errors import ConfigurationError, DecodingError

THREE = [[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]]


def random(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=draw, dtype=torch.float64)


def near_copies(amplification):
    """Two rows that differ by so little that the loss of both experts amplifies noise so much."""
    half = 0.5 / amplification
    return [[0.5 + half, 0.5 - half], [0.5 - half, 0.5 + half]]


REFUSED = {
    r"row 0 of the code is .*, which sums to 0\.9": (ConfigurationError, [[0.5, 0.4]]),
    "row 0 of the code .* sums to nan": (ConfigurationError, [[0.5, math.nan]]),
    "row 1 .*, expected weights of at least 0": (ConfigurationError, [[0.5, 0.5], [1.25, -0.25]]),
    "not a matrix of numbers": (ConfigurationError, [[0.5, 0.5], [1.0]]),
    r"shape \[0\], expected R rows": (ConfigurationError, []),
    r"shape \[2\], expected R rows": (ConfigurationError, [0.5, 0.5]),
    "found 5852925 erasures of 8 of 30 experts": (ConfigurationError, np.full((8, 30), 1 / 30)),
    "loss of experts 2 with 1 coded models": (DecodingError, [[0.5, 0.5, 0.0]]),
    "loss of experts 1, 2": (DecodingError, [[0.2, 0.4, 0.4], [0.4, 0.3, 0.3]]),
    r"noise 1\.1e\+04-fold, expected at most 1e\+04": (DecodingError, near_copies(11_000)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_matrix_that_is_no_code_is_refused(message):
    error, matrix = REFUSED[message]
    with pytest.raises(error, match=message):
        Code(matrix)


def test_an_amplification_up_to_ten_thousand_is_taken():
    code = Code(near_copies(9_000))
    assert code.worst_amplification() == pytest.approx(9_000)


def test_rows_are_divided_by_sums_that_are_the_same_on_every_processor():
    weights = random(7, 50)
    for row in weights / weights.sum(1, keepdim=True):
        rounded = [round(weight, 9) for weight in row.tolist()]
        *_, total = accumulate(rounded)  # one by one: a vectorised sum has other last bits
        assert Code([rounded]).matrix.tolist() == [[weight / total for weight in rounded]]


def test_encode_is_the_weighted_sum_in_the_outputs_type():
    code = Code(THREE)
    outputs = random(3, 5, 4)
    expected = np.einsum("rn,nbc->rbc", THREE, outputs.numpy())
    np.testing.assert_allclose(code.encode(outputs), expected, rtol=1e-14)
    assert code.encode(outputs.float()).dtype == torch.float32


@pytest.mark.parametrize("erased", [(0,), (2,), (0, 1), (1, 2)])
def test_amplification_is_the_largest_gain_of_the_decoding_map(erased):
    columns = np.array(THREE)[:, erased]
    largest_gain = np.linalg.norm(np.linalg.pinv(columns), ord=2)
    assert Code(THREE).amplification(erased) == pytest.approx(largest_gain, rel=1e-12)


def test_a_loss_of_more_experts_than_rows_amplifies_without_bound():
    assert Code([[0.2, 0.8]]).amplification([0, 1]) == math.inf


@pytest.mark.parametrize("erased", [(), (1, 1), (3,), (-1,)])
def test_a_loss_that_names_no_experts_is_refused(erased):
    message = r"found the erasure \[.*expected different experts, at least one"
    with pytest.raises(DecodingError, match=message):
        Code(THREE).amplification(erased)


def test_erasures_are_all_of_up_to_as_many_experts_as_rows():
    assert Code(THREE).erasures() == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]


SIZES = [(experts, coded) for experts in range(1, 9) for coded in range(1, min(experts, 4) + 1)]


@pytest.mark.parametrize(("experts", "coded"), SIZES)
def test_every_loss_of_a_ready_code_decodes_exactly(experts, coded):
    code = convex(experts, coded)
    assert code.matrix.shape == (coded, experts)
    outputs = random(experts, 3, 2, seed=experts)
    for erased in code.erasures():
        survivors = [expert for expert in range(experts) if expert not in erased]
        decoded = decode_linear(code.matrix, code.encode(outputs), outputs[survivors], erased)
        torch.testing.assert_close(decoded, outputs[list(erased)], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("experts", "coded"), SIZES)
def test_a_ready_code_amplifies_less_than_200_random_ones(experts, coded):
    worst = convex(experts, coded).worst_amplification()
    if coded in (1, experts):  # the optimum: uniform weights, and copies
        assert worst == pytest.approx(experts if coded == 1 else 1)
    rows = random(200, coded, experts)
    rows /= rows.sum(2, keepdim=True)
    losses = torch.tensor(list(combinations(range(experts), coded)))
    columns = rows[:, :, losses].transpose(1, 2)  # [200, losses, R, R]
    smallest = torch.linalg.svdvals(columns)[..., -1].amin(1)
    assert worst <= float(1 / smallest.max()) * (1 + 1e-12)


@pytest.mark.parametrize(("experts", "coded"), [(0, 1), (3, 0), (3, 4), (9, 2), (7, 5)])
def test_sizes_without_a_ready_code_are_refused(experts, coded):
    with pytest.raises(ConfigurationError, match=f"{coded} coded models for {experts} experts"):
        convex(experts, coded)
