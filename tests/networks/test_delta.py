import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st

from coin.networks.delta import (
    Rounded,
    balanced,
    byte_row,
    levels,
    quantise,
    read_factor,
    read_rows,
    round_factor,
)

MATRICES = (st.integers(1, 8), st.integers(1, 5), st.integers(1, 50), st.integers(0, 2**31))


@settings(deadline=None)
@given(*MATRICES)
def test_levels_are_packed_bit_for_bit_and_read_back_exactly(bits, rows, columns, seed):
    torch.manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns))
    exponents = torch.randint(-12, 2, (rows,))
    scale = torch.rand(rows).add(1).ldexp(exponents).bfloat16()  # of all sizes that weights have
    found = levels(bits)[codes]
    rounded = Rounded.of(found, scale, bits)
    assert torch.equal(rounded.levels, found)
    assert torch.equal(rounded.scale, scale)
    exact = found.double() * scale.double()[:, None]
    assert torch.equal(rounded.dense().double(), exact)
    packed = rounded.packed()
    size = math.ceil(bits * columns / 8)  # every row begins at a byte
    for row, code in zip(packed, codes, strict=True):
        digits = "".join(f"{each:0{bits}b}" for each in code).ljust(8 * size, "0")
        assert bytes(row.tolist()) == int(digits, 2).to_bytes(size)
    assert rounded.nbytes == packed.nbytes + scale.nbytes
    assert torch.equal(Rounded.unpacked(packed, scale, bits, columns).rows, rounded.rows)


def heavy(rows=40, columns=300):
    """Return a matrix as deltas are, with a row of zeros and an outlier."""
    torch.manual_seed(0)
    matrix = torch.distributions.Laplace(0.0, 1e-3).sample((rows, columns))
    matrix[3] = 0
    matrix[4, 7] = 0.3
    return matrix


def least_error(row):
    """Return the least squared error of 16 even steps over ranges whose ends are shares of a row's own."""
    errors = []
    shares = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    for of_low, of_high in product(shares, shares):
        low = row.min() * of_low
        step = (row.max() * of_high - low) / 15
        steps = low.half().float() + step.half().float() * torch.arange(16)
        misses = (row[:, None] - steps).abs().amin(1)
        errors.append(float(misses.square().sum()))
    return min(errors)


def test_factors_take_half_a_byte_a_value_in_the_range_of_the_least_squared_error():
    torch.manual_seed(0)
    matrix = torch.cat([torch.randn(5, 31), 1e3 * heavy(8, 31)[4:], torch.rand(2, 31) ** 3])
    rows = round_factor(matrix)
    assert rows.shape == (len(matrix), 16 + 4)
    errors = (read_factor(rows, 31) - matrix).square().sum(1)
    expected = torch.tensor([least_error(row) for row in matrix])
    torch.testing.assert_close(errors, expected, rtol=1e-4, atol=0)
    assert not read_factor(round_factor(torch.zeros(2, 6)), 6).any()


@pytest.mark.parametrize("exponent", [-12, 12])
def test_both_factors_are_made_as_large(exponent):
    torch.manual_seed(0)
    left = torch.randn(3, 8) * 10.0**exponent
    right = torch.randn(3, 9)
    balance = balanced(left, right)
    largest = (left * balance).abs().amax(1)
    torch.testing.assert_close(largest, (right / balance).abs().amax(1))
    assert balanced(0 * left, right).tolist() == [[1], [1], [1]]


def test_a_row_of_bytes_holds_values_to_half_a_step():
    torch.manual_seed(0)
    values = torch.randn(1, 100)
    read = read_rows(byte_row(values))
    step = float(values.max() - values.min()) / 255
    torch.testing.assert_close(read, values, rtol=0, atol=0.51 * step)
    assert torch.equal(read_rows(byte_row(torch.ones(7))), torch.ones(1, 7))


def test_levels_which_files_count_are_these():
    assert levels(1).tolist() == [-127, 127]
    assert levels(3).tolist() == [-127, -73, -38, -11, 11, 38, 73, 127]
    assert levels(8).tolist() == list(range(-128, 128))


def scale_by_definition(row, known):
    """Return the best scale of all clips, each refined twice, and its error; sums are direct, in float64."""
    row = row.double()
    found = []

    def taken(scale):
        return known[(row[:, None] / scale - known).abs().argmin(1)]

    for clip in (0.15, 0.25, 0.35, 0.5, 0.7, 1.0):
        scale = float(row.abs().max() * clip / known[-1])
        for _ in range(2):
            own = taken(scale)
            scale = float((row @ own) / (own @ own))
        scale = float(torch.tensor(scale).bfloat16())
        error = float((row - scale * taken(scale)).square().sum())
        found.append((error, scale))
    error, scale = min(found, key=lambda each: each[0])  # the first of equals
    return scale, error


@pytest.mark.parametrize("bits", range(1, 9))
def test_scales_and_levels_are_those_of_the_definition(bits):
    matrix = torch.cat([heavy(8, 301), torch.randn(4, 301), torch.randn(4, 301) ** 5])
    found = quantise(matrix, bits)
    known = levels(bits).double()
    live = matrix.abs().amax(1) > 0
    expected = [scale_by_definition(row, known) for row in matrix[live]]
    assert found.scale[live].tolist() == [scale for scale, _ in expected]
    errors = (matrix - found.dense().double()).square().sum(1)
    least = torch.tensor([error for _, error in expected]).double()
    torch.testing.assert_close(errors[live], least, rtol=1e-6, atol=0)
    assert not found.dense()[~live].any()


def test_the_levels_leave_less_error_than_even_ones():
    matrix = heavy()[5:]
    even = torch.linspace(-127, 127, 8).double()
    of_even = [scale_by_definition(row, even)[1] for row in matrix]
    errors = (matrix - quantise(matrix, 3).dense()).square().sum(1)
    shares = errors / torch.tensor(of_even)
    assert shares.median() < 0.77


def test_a_scale_is_the_same_whatever_the_order_of_its_sums():
    torch.manual_seed(2)
    matrix = torch.randn(40_000, 16)  # in float32 two of these scales depend on it
    assert torch.equal(quantise(matrix, 8).scale, quantise(matrix.flip(1), 8).scale)
