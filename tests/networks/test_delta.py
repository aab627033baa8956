import math

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

COUNTS = (st.integers(1, 5), st.integers(1, 50), st.integers(0, 2**31))


def random_levels(known, rows, columns, seed):
    """Levels drawn from the known ones, and scales of all sizes that weights have."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(known), (rows, columns), generator=generator)
    exponents = torch.randint(-12, 2, (rows,), generator=generator)
    scale = torch.rand(rows, generator=generator).add(1).mul(2.0**exponents)
    return known[places], scale.bfloat16()


@settings(deadline=None)
@given(st.integers(1, 8), *COUNTS)
def test_places_of_levels_are_packed_bit_for_bit_in_as_few_bytes_a_row_as_they_have_bits(
    bits, rows, columns, seed
):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    packed = Rounded.of(levels(bits)[codes], torch.ones(rows).bfloat16(), bits).packed()
    digits = ["".join(f"{code:0{bits}b}" for code in row) for row in codes.tolist()]
    size = math.ceil(bits * columns / 8)
    expected = [list(int(row.ljust(8 * size, "0"), 2).to_bytes(size)) for row in digits]
    assert packed.tolist() == expected


@settings(deadline=None)
@given(st.integers(1, 8), *COUNTS)
def test_levels_are_read_back_exactly_from_rows_and_files_on_every_device(
    bits, rows, columns, seed
):
    found, scale = random_levels(levels(bits), rows, columns, seed)
    rounded = Rounded.of(found, scale, bits)
    expected = (found.double() * scale.double()[:, None]).float()
    assert rounded.rows.shape == (rows, columns + 8)
    assert torch.equal(rounded.dense(), expected)
    assert torch.equal(plain_read(rounded.rows), expected)
    assert torch.equal(rounded.levels, found)
    assert torch.equal(rounded.scale, scale)
    packed = rounded.packed()
    assert rounded.nbytes == packed.nbytes + scale.nbytes
    assert torch.equal(Rounded.unpacked(packed, scale, bits, columns).rows, rounded.rows)


def plain_read(rows):
    """What an accelerator computes: codes times a scale plus an offset."""
    ends = rows[:, -8:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return rows[:, :-8].float() * ends[:, :1] + ends[:, 1:]


def plain_factor(rows, columns):
    """What an accelerator computes of half bytes."""
    scale, first = (
        rows[:, -4:]
        .clone(memory_format=torch.contiguous_format)
        .view(torch.float16)
        .float()
        .T[..., None]
    )
    codes = torch.stack([rows[:, :-4] & 15, rows[:, :-4] >> 4], 2).flatten(1)
    return (codes * scale + first)[:, :columns]


def least_error(row, shares):
    """The least squared error of 16 even steps over ranges whose ends are these shares of a row's own."""
    errors = []
    for low in shares:
        for high in shares:
            first = (row.min() * low).half().float()
            step = ((row.max() * high - row.min() * low) / 15).half().float()
            codes = ((row - first) / step).round().clamp(0, 15)
            errors.append(float((codes * step + first - row).square().sum()))
    return min(errors)


def test_factors_take_half_a_byte_a_value_in_the_range_of_the_least_squared_error():
    torch.manual_seed(0)
    matrix = torch.cat([torch.randn(5, 31), heavy(8, 31)[4:] * 1e3, torch.rand(2, 31) ** 3])
    rows = round_factor(matrix)
    assert rows.shape == (len(matrix), 16 + 4)
    read = read_factor(rows, 31)
    torch.testing.assert_close(read, plain_factor(rows, 31), rtol=1e-6, atol=1e-7)
    errors = (read - matrix).square().sum(1)
    expected = [least_error(row, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]) for row in matrix]
    torch.testing.assert_close(errors, torch.tensor(expected), rtol=1e-4, atol=0)
    assert not read_factor(round_factor(torch.zeros(2, 6)), 6).any()


@pytest.mark.parametrize("exponent", [-12, 12])
def test_both_factors_are_made_as_large_and_keep_their_product(exponent):
    torch.manual_seed(0)
    left, right = torch.randn(3, 8) * 10.0**exponent, torch.randn(3, 9)
    left[2] = 0
    balance = balanced(left, right)
    product = left.T @ right
    error = float(((left * balance).T @ (right / balance) - product).abs().max())
    assert error <= 1e-5 * float(product.abs().max())
    torch.testing.assert_close(
        (left * balance).abs().amax(1)[:2], (right / balance).abs().amax(1)[:2]
    )
    assert balance[2] == 1  # of nothing


def test_a_row_of_bytes_holds_its_least_and_largest_values_and_those_between_to_half_a_step():
    torch.manual_seed(0)
    values = torch.randn(5, 20)
    read = read_rows(byte_row(values))
    assert read.shape == (1, 100)
    step = (values.max() - values.min()) / 255
    assert float((read.view(5, 20) - values).abs().max()) <= float(step) * 0.51
    assert torch.equal(read_rows(byte_row(torch.ones(7))), torch.ones(1, 7))


def test_the_fewest_bits_are_symmetric_and_eight_are_all_of_a_byte():
    for bits in range(1, 8):
        known = levels(bits).int()
        assert torch.equal(known, -known.flip(0))
        assert known[-1] == 127
    assert levels(8).tolist() == list(range(-128, 128))
    assert levels(1).tolist() == [-127, 127]


def scale_by_definition(row, known):
    """The best of all clips, each refined twice; sums are direct, in float64."""
    best, least = 0.0, math.inf

    def taken(scale):
        return known[(row.double()[:, None] / scale - known).abs().argmin(1)]

    for clip in (0.15, 0.25, 0.35, 0.5, 0.7, 1.0):
        scale = float(row.abs().max()) * clip / float(known[-1])
        for _ in range(2):
            scale = float((row * taken(scale)).sum() / taken(scale).square().sum())
        scale = float(torch.tensor(scale).bfloat16())
        error = float((row - scale * taken(scale)).square().sum())
        if error < least:
            best, least = scale, error
    return best


@pytest.mark.parametrize("bits", range(1, 9))
def test_scales_and_levels_are_those_of_the_definition(bits):
    matrix = torch.cat([heavy(8, 301), torch.randn(4, 301), torch.randn(4, 301) ** 5])
    found = quantise(matrix, bits)
    known = levels(bits).double()
    live = matrix.abs().amax(1) > 0
    assert found.scale[live].tolist() == [scale_by_definition(row, known) for row in matrix[live]]
    scales = found.scale.double()[:, None]
    misses = (matrix[..., None] - known * scales[..., None]).abs().amin(2)
    missed = (matrix - found.levels * scales).abs()
    torch.testing.assert_close(missed[live], misses[live], rtol=1e-6, atol=0)
    assert not found.dense()[~live].any()


def heavy(rows=40, columns=300):
    draw = torch.distributions.Laplace(0.0, 1e-3)
    torch.manual_seed(0)
    matrix = draw.sample((rows, columns))
    matrix[3] = 0
    matrix[4, 7] = 0.3  # an outlier
    return matrix


@pytest.mark.parametrize(("bits", "share"), [(2, 0.8), (3, 0.75), (4, 0.75), (8, 1.1)])
def test_the_levels_leave_less_error_than_even_ones_clipped_as_well_as_can_be(bits, share):
    matrix, most = heavy(), 2 ** (bits - 1) - 1
    clips = [matrix.abs().amax(1, keepdim=True) * clip / 50 for clip in range(1, 51)]
    even = [
        (matrix / clip * most).round().clamp(-most, most).nan_to_num() * clip / most
        for clip in clips
    ]
    best = torch.stack([(matrix - each).square().sum(1) for each in even]).amin(0)
    error = (matrix - quantise(matrix, bits).dense()).square().sum(1)
    assert (error / best).nanmedian() < share
    plain = torch.arange(len(matrix)) != 4  # the row with the outlier needs 8 bits
    assert bool((error <= 1.3 * best)[plain].all())


def test_a_scale_is_the_same_whatever_the_order_of_its_sums():
    torch.manual_seed(2)
    matrix = torch.randn(40_000, 16)  # in float32 two of these scales depend on it
    assert torch.equal(quantise(matrix, 8).scale, quantise(matrix.flip(1), 8).scale)
