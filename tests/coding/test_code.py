from itertools import accumulate, combinations

import pytest
import torch

from coin.coding import Answers, Code, convex, make_decoder
from coin.errors import ConfigurationError, DecodingError


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.5, 0.4]], r"row 0 of the code is .*, which sums to 0\.9"),
        ([[0.5, 0.5], [1.25, -0.25]], "row 1 of the code .*, expected weights of at least 0"),
        ([[0.5, float("nan")]], "row 0 of the code .* sums to nan"),
        ([[0.5, 0.5], [1.0]], "not a matrix of numbers"),
        ([], "expected R rows"),
        ([0.5, 0.5], "expected R rows"),
    ],
)
def test_a_bad_matrix_is_refused_with_the_row(matrix, message):
    with pytest.raises(ConfigurationError, match=message):
        Code(matrix)


@pytest.mark.parametrize(
    ("matrix", "experts"),
    [
        ([[0.5, 0.5, 0.0]], "experts 2"),
        ([[0.2, 0.4, 0.4], [0.4, 0.3, 0.3]], "experts 1, 2"),
        ([[0.5, 0.5], [0.5, 0.5]], "experts 0, 1"),
        ([[1.0 - 1e-9, 1e-9]], "experts 1"),
    ],
)
def test_a_code_that_breaks_its_promise_is_refused(matrix, experts):
    with pytest.raises(DecodingError, match=f"loss of {experts}"):
        Code(matrix)


def test_an_erasure_is_refused_from_an_amplification_of_ten_thousand_on():
    def code(amplification):  # of the loss of both: the smaller singular value is the difference of the columns
        half = 0.5 / amplification
        return Code([[0.5 + half, 0.5 - half], [0.5 - half, 0.5 + half]])

    assert code(9_000).worst_amplification() == pytest.approx(9_000)
    with pytest.raises(DecodingError, match=r"would amplify noise 1\.1e\+04-fold, expected at most 1e\+04"):
        code(11_000)


def test_row_sums_within_the_tolerance_are_made_exact():
    code = Code([[0.3333333, 0.3333333, 0.3333333]])
    torch.testing.assert_close(code.matrix.sum(1), torch.ones(1, dtype=torch.float64), rtol=0, atol=1e-15)


def test_rows_are_divided_by_sums_that_are_the_same_on_every_processor():
    weights = torch.rand(7, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row in (weights / weights.sum(1, keepdim=True)).tolist():
        rounded = [round(weight, 9) for weight in row]
        total = list(accumulate(rounded))[-1]  # a vectorised sum has other last bits
        assert Code([rounded]).matrix.tolist() == [[weight / total for weight in rounded]]


def test_encode_is_the_weighted_sum():
    outputs = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    code = Code([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    sums = (sum(weight * output for weight, output in zip(row, outputs, strict=True)) for row in code.matrix)
    expected = torch.stack([*sums])
    torch.testing.assert_close(code.encode(outputs), expected)
    assert code.encode(outputs.float()).dtype == torch.float32


def test_amplification_is_the_largest_over_error_directions():
    one = Code([[0.2, 0.3, 0.5]])
    assert [one.amplification([expert]) for expert in range(3)] == pytest.approx([1 / 0.2, 1 / 0.3, 1 / 0.5])
    assert (one.worst_amplification(), one.amplification([0, 1])) == (pytest.approx(5), float("inf"))
    code = Code([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
    generator = torch.Generator().manual_seed(0)
    for erased in [(0,), (2,), (0, 1), (1, 2)]:
        inverse = torch.linalg.pinv(code.matrix[:, list(erased)])
        errors = torch.randn(2, 20_000, generator=generator, dtype=torch.float64)
        gains = (inverse @ errors).norm(dim=0) / errors.norm(dim=0)
        assert gains.max() <= code.amplification(erased) * (1 + 1e-12)
        assert gains.max() > 0.999 * code.amplification(erased)


def test_erasures_are_all_of_up_to_r_experts():
    code = Code([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
    assert code.erasures() == [(0,), (1,), (2,), *combinations(range(3), 2)]


@pytest.mark.parametrize("erased", [(), (1, 1), (3,), (-1,)])
def test_a_bad_erasure_is_refused(erased):
    with pytest.raises(DecodingError, match=r"found the erasure \[.*expected different experts, at least one"):
        Code([[0.2, 0.3, 0.5]]).amplification(erased)


SIZES = [(n, r) for n in range(1, 9) for r in range(1, min(n, 4) + 1)]


@pytest.mark.parametrize(("experts", "coded"), SIZES)
def test_every_erasure_of_a_ready_code_decodes_exactly_and_amplifies_less_than_of_random_ones(experts, coded):
    code = convex(experts, coded)
    assert (code.num_coded, code.num_experts) == (coded, experts)
    outputs = torch.randn(experts, 3, 2, generator=torch.Generator().manual_seed(experts), dtype=torch.float64)
    for erased in code.erasures():
        arrived = outputs.clone()
        arrived[list(erased)] = torch.nan
        decoded = make_decoder("linear", code, erased).decode(Answers(arrived, code.encode(outputs)))
        torch.testing.assert_close(decoded, outputs[list(erased)], rtol=1e-11, atol=1e-11)
    worst = code.worst_amplification()
    # Uniform weights are the optimum of one row (1/min β ≥ N); copies, of N rows.
    if coded in (1, experts):
        assert worst == pytest.approx(experts if coded == 1 else 1)
    rows = torch.rand(200, coded, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    subsets = torch.tensor(list(combinations(range(experts), coded)))
    rows /= rows.sum(2, keepdim=True)
    smallest = torch.linalg.svdvals(rows[:, :, subsets].transpose(1, 2))[..., -1].amin(1)
    assert worst <= float(1 / smallest.max()) * (1 + 1e-12)


@pytest.mark.parametrize(("experts", "coded"), [(0, 1), (3, 0), (3, 4), (9, 2), (7, 5)])
def test_sizes_are_checked(experts, coded):
    with pytest.raises(ConfigurationError, match=f"{coded} coded models for {experts} experts"):
        convex(experts, coded)
