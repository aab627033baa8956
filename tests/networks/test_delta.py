import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from coin.networks.delta import EQUAL, HALF, WHOLE, decode, encode, pack, quantise, size, unpack


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 50), st.integers(0, 2**31))
def test_packed_codes_are_read_back_bit_for_bit_in_as_few_bytes_as_they_have_bits(bits, count, seed):
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed)).byte()
    packed = pack(codes, bits)
    assert packed.numel() == math.ceil(bits * count / 8)
    assert torch.equal(unpack(packed, bits, count), codes)


def heavy(rows=40, columns=300):
    draw = torch.distributions.Laplace(0.0, 1e-3)
    torch.manual_seed(0)
    matrix = draw.sample((rows, columns))
    matrix[3] = 0
    matrix[4, 7] = 0.3  # an outlier
    return matrix


def test_one_bit_is_the_sign_times_the_mean_absolute_value():
    matrix = heavy()
    expected = torch.where(matrix > 0, 1.0, -1.0) * matrix.abs().mean(1, keepdim=True)
    expected[3] = 0
    torch.testing.assert_close(quantise(matrix, 1).dense(), expected, rtol=4e-3, atol=0)  # bfloat16


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
    for odd in (mask, torch.tensor(7), torch.tensor([True, False]), torch.randn(3, dtype=torch.complex64)):
        kind, data = encode(odd, torch.zeros_like(odd), 3)
        assert kind == WHOLE
        assert torch.equal(decode(kind, data, torch.zeros_like(odd)), odd)


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
