import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from coin.networks.delta import (
    EQUAL,
    HALF,
    WHOLE,
    Rounded,
    by_row,
    decode,
    encode,
    levels,
    pack,
    quantise,
    read,
    size,
    unpack,
)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 50), st.integers(0, 2**31))
def test_packed_codes_are_read_bit_for_bit_in_as_few_bytes_a_row_as_they_have_bits(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), generator=generator).byte()
    scale = torch.randn(rows, generator=generator).bfloat16()  # levels of both kinds
    packed = pack(codes, bits)
    digits = ["".join(f"{code:0{bits}b}" for code in row) for row in codes.tolist()]
    size = math.ceil(bits * columns / 8)
    expected = [list(int(row.ljust(8 * size, "0"), 2).to_bytes(size)) for row in digits]
    assert packed.tolist() == expected
    assert torch.equal(unpack(packed, bits, columns), codes)
    values = levels(bits)[(scale < 0).long()].gather(1, codes.long()) * scale.float().abs()[:, None]
    assert torch.equal(read(packed, *by_row(scale, bits), bits, columns), values)
    assert torch.equal(Rounded(codes, scale, bits).dense(), values)


def scale_by_definition(row, bits):
    """The best of all clips and both kinds, each refined twice; sums are direct, in float64."""
    best, least = 0.0, float(row.double().square().sum())
    for kind in [1] if bits == 8 else [0, 1]:
        known = levels(bits)[kind].double()

        def taken(scale, known=known):
            return known[(row.double()[:, None] / scale - known).abs().argmin(1)]

        for clip in (0.15, 0.25, 0.35, 0.5, 0.7, 1.0):
            scale = float(row.abs().max()) * clip
            for _ in range(2):
                scale = float((row * taken(scale)).sum() / taken(scale).square().sum())
            scale = float(torch.tensor(scale).bfloat16())
            error = float((row - scale * taken(scale)).square().sum())
            if error < least:
                best, least = -scale if kind else scale, error
    return best


@pytest.mark.parametrize("bits", range(1, 9))
def test_scales_and_codes_are_those_of_the_definition(bits, monkeypatch):
    monkeypatch.setattr("coin.networks.delta._BLOCK_VALUES", 500)  # blocks of one row and of several
    matrix = torch.cat([heavy(8, 301), torch.randn(4, 301), torch.randn(4, 301) ** 5])
    found = quantise(matrix, bits)
    live = matrix.abs().amax(1) > 0
    assert found.scale[live].tolist() == [scale_by_definition(row, bits) for row in matrix[live]]
    known = levels(bits)[(found.scale < 0).long()].double()
    misses = (matrix[..., None] - known[:, None] * found.scale.double().abs()[:, None, None]).abs()
    assert torch.equal(misses.gather(2, found.codes[..., None].long())[..., 0][live], misses.amin(2)[live])
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
    even = [(matrix / clip * most).round().clamp(-most, most).nan_to_num() * clip / most for clip in clips]
    best = torch.stack([(matrix - each).square().sum(1) for each in even]).amin(0)
    error = (matrix - quantise(matrix, bits).dense()).square().sum(1)
    assert (error / best).nanmedian() < share
    assert bool((error <= 1.3 * best).all())  # of the row with the outlier too


def test_a_scale_is_the_same_whatever_the_order_of_its_sums():
    torch.manual_seed(2)
    matrix = torch.randn(40_000, 16)  # in float32 two of these scales depend on it
    assert torch.equal(quantise(matrix, 8).scale, quantise(matrix.flip(1), 8).scale)


def test_what_no_delta_can_hold_is_kept_as_it_is():
    base = torch.randn(8, 20)
    cases = {
        EQUAL: base.clone(),
        HALF: base[0] + torch.randn(20),
        WHOLE: base[0] + 1e9 * torch.randn(20),  # float16 ends at 65504
    }
    for expected, tensor in cases.items():
        own = base if tensor.shape == base.shape else base[0]
        kind, data = encode(tensor, own, 3)
        assert kind == expected
        assert data.numel() == size(kind, own)
        torch.testing.assert_close(decode(kind, data, own), tensor, rtol=0 if expected != HALF else 1e-3, atol=1e-3)
    mask = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    for odd in (mask, torch.tensor(7), torch.tensor([True, False])):
        kind, data = encode(odd, torch.zeros_like(odd), 3)
        assert kind == WHOLE
        assert torch.equal(decode(kind, data, torch.zeros_like(odd)), odd)


@pytest.mark.parametrize(("size_in_steps", "kind"), [(600, HALF), (400, WHOLE)])
def test_a_vector_is_kept_in_float16_where_that_holds_it_to_a_thousandth(size_in_steps, kind):
    step = 2.0**-24  # between the smallest numbers of float16, whose rounding costs half of one
    tensor = torch.full((8,), (size_in_steps + 0.5) * step)
    assert encode(tensor, torch.zeros(8), 4)[0] == kind


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_type_comes_back_as_itself(dtype):
    torch.manual_seed(0)
    base = torch.randn(16, 8, 3, 3).to(dtype)
    tensor = base + 0.1 * torch.randn_like(base)
    kind, data = encode(tensor, base, 3)
    assert data.numel() == size(kind, base)
    found = decode(kind, data, base)
    assert (found.dtype, found.shape) == (dtype, base.shape)
    again = encode(found, base, 3)  # what was rounded once
    assert (found - base).float().norm() < 1.1 * (tensor - base).float().norm()
    assert again[0] == kind


@pytest.mark.parametrize("shape", [(1, 17, 32), (32, 1, 3, 3), (5, 1), (7,), (), (1, 1, 24)])
def test_odd_shapes_take_the_bytes_that_they_say(shape):
    torch.manual_seed(0)
    base, tensor = torch.zeros(shape), torch.randn(shape)
    for bits in (1, 3, 8, None):
        kind, data = encode(tensor, base, bits)
        assert data.numel() == size(kind, base) <= max(2 * tensor.numel(), 4)
        assert decode(kind, data, base).shape == tensor.shape
