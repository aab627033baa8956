"""The risk of decoded answers, against what it says it is."""

import math

import pytest
import torch
from scipy.stats import multivariate_normal

from coin.coding import Answers, Code, DecoderConfig, decoding_risk, make_decoder, uniform
from coin.coding.risk import POINTS
from coin.errors import DecodingError, NumericalError


def tail(z):
    return 0.5 * math.erfc(z / math.sqrt(2))


def answers_of(noise, samples=300, classes=4, experts=3, seed=0):
    """Experts with random logits, and a coded model that is wrong by normal noise."""
    draw = torch.Generator().manual_seed(seed)
    own = 2 * torch.randn(experts, samples, classes, generator=draw, dtype=torch.float64)
    wrong = noise * torch.randn(1, samples, classes, generator=draw, dtype=torch.float64)
    return Answers(own, uniform(experts).encode(own) + wrong)


def test_it_is_the_probability_that_any_rival_wins():
    """Against SciPy's integral of the normal distribution of all margins' errors."""
    draw = torch.Generator().manual_seed(0)
    decoded = torch.randn(20, 5, generator=draw, dtype=torch.float64)
    errors = torch.randn(30, 5, generator=draw, dtype=torch.float64)
    moments = errors.T @ errors / 30
    found = decoding_risk(decoded, moments)
    for row, risk in zip(decoded, found.tolist(), strict=True):
        a = int(row.argmax())
        apart = torch.eye(5, dtype=torch.float64)[a] - torch.eye(5, dtype=torch.float64)[torch.arange(5) != a]
        normal = multivariate_normal(cov=(apart @ moments @ apart.T).numpy(), seed=0)
        wanted = 1 - normal.cdf((apart @ row).numpy())
        total = sum(
            tail(float(m / v**0.5)) for m, v in zip(apart @ row, (apart @ moments @ apart.T).diagonal(), strict=True)
        )
        assert risk == pytest.approx(wanted, abs=1e-4 + 3 * wanted * ((total / wanted - 1) / POINTS) ** 0.5)


def test_between_two_classes_it_is_the_tail_of_the_margin_over_its_error():
    decoded, moments = torch.tensor([[1.0, 0.2], [0.0, 4.0]]).double(), torch.tensor([[0.5, 0.1], [0.1, 0.3]]).double()
    wanted = [tail(0.8 / 0.6**0.5), tail(4 / 0.6**0.5)]
    assert decoding_risk(decoded, moments).tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("classes", [3, 10, pytest.param(100, marks=pytest.mark.slow)])
def test_among_many_classes_as_many_answers_differ_as_foretold(classes):
    """The pairwise maximum foretold 0.28 for 0.38 at ten classes, and 0.34 for 0.56 at a hundred."""
    draw = torch.Generator().manual_seed(classes)
    mix = torch.randn(classes, classes, generator=draw, dtype=torch.float64) / classes**0.5
    moments = (mix @ mix.T + 0.3 * torch.eye(classes)) / 2
    decoded = 1.5 * torch.randn(4000, classes, generator=draw, dtype=torch.float64)
    own = decoded - torch.randn(4000, classes, generator=draw, dtype=torch.float64) @ torch.linalg.cholesky(moments).T
    differ = (own.argmax(1) != decoded.argmax(1)).double().mean()
    assert float(decoding_risk(decoded, moments).mean()) == pytest.approx(float(differ), abs=0.025)


@pytest.mark.parametrize(
    ("rank", "shift"), [(5, 0.0), *(pytest.param(100, shift, marks=pytest.mark.slow) for shift in (0.0, 50.0))]
)
def test_errors_in_few_directions_or_that_all_classes_share(rank, shift):
    """Each factor of the moments had to be found anew, and was not; rivals beyond 32 counted as independent."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(100, rank, generator=draw, dtype=torch.float64) / rank**0.5
    decoded = torch.randn(1000, 100, generator=draw, dtype=torch.float64)
    errors = torch.randn(1000, rank, generator=draw, dtype=torch.float64) @ mix.T
    moments = mix @ mix.T + shift**2
    differ = ((decoded - errors).argmax(1) != decoded.argmax(1)).double().mean()
    for precision in (torch.float64, torch.float32):
        risk = decoding_risk(decoded, moments.to(precision))
        assert float(risk.mean()) == pytest.approx(float(differ), abs=0.03)


def test_a_thousand_classes_that_are_alike():
    decoded, draw = torch.zeros(1, 1000, dtype=torch.float64), torch.Generator().manual_seed(0)
    decoded[0, 0] = 5
    errors = torch.cat([torch.randn(2000, 1000, generator=draw, dtype=torch.float64) for _ in range(5)])
    differ = ((decoded - errors).argmax(1) != 0).double().mean()
    assert float(decoding_risk(decoded, torch.eye(1000))) == pytest.approx(
        float(differ), rel=0.25
    )  # it was three times


def test_inside_inference_mode_and_with_gradients_behind_it():
    with torch.inference_mode():
        decoding_risk(torch.zeros(1, 11), torch.eye(11))
    decoded = torch.zeros(1, 11, requires_grad=True)
    assert not decoding_risk(2 * decoded, torch.eye(11)).requires_grad


def test_errors_in_one_direction_only_and_small_risks():
    """Two rivals that win together count once; far out in the tail the number is still exact."""
    along = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    risk = decoding_risk(torch.tensor([[1.0, 0.0, 0.0], [16.0, 0.0, 0.0]]), torch.outer(along, along))
    assert risk.tolist() == pytest.approx([tail(0.5), 2 * tail(8.0)], rel=1e-3)


def test_errors_that_are_no_numbers_are_refused():
    """One NaN among the calibration samples made every answer's risk one half."""
    answers = answers_of(0.1)
    answers.coded[0, 7, 2] = math.nan
    with pytest.raises(NumericalError, match=r"sample 7 of the calibration answers"):
        make_decoder("linear", uniform(3), [1]).fit(answers)
    with pytest.raises(NumericalError, match="not finite"):
        decoding_risk(torch.ones(2, 3), torch.full((3, 3), math.nan))


def test_what_is_exact_has_no_risk_and_what_is_not_finite_has_all():
    decoded = torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 1.0], [math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0]])
    assert decoding_risk(decoded, torch.zeros(3, 3)).tolist() == [0.0, 0.5, 1.0, 1.0]
    assert decoding_risk(torch.ones(2, 1), torch.ones(1, 1)).tolist() == [0.0, 0.0]  # there is one class


@pytest.mark.parametrize("kind", ["linear", "ridge", "feature_ridge"])
def test_linear_networks_are_decoded_without_risk(kind):
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 3, generator=draw, dtype=torch.float64)
    own = inputs @ torch.randn(2, 3, 4, generator=draw, dtype=torch.float64)
    code = Code([[0.3, 0.7]])
    answers = Answers(own, code.encode(own), [inputs, inputs], [inputs])
    decoder = make_decoder(kind, code, [1]).fit(answers)
    assert decoder.errors.abs().max() < 1e-9
    assert decoder.risk(1, decoder.decode(answers)[0]).max() < 1e-3


@pytest.mark.parametrize("kind", ["linear", "ridge"])
def test_normal_errors_are_foretold_and_what_is_kept_is_better(kind):
    """The noise is all there is: of 4,000 new inputs as many disagree as said, and fewer among those of less risk."""
    code, new = uniform(3), answers_of(0.2, 4000, seed=1)
    decoder = make_decoder(kind, code, [1]).fit(answers_of(0.2))
    decoded = decoder.decode(new)[0]
    risk, wrong = decoder.risk(1, decoded), decoded.argmax(1) != new.experts[1].argmax(1)
    assert 0.1 < float(wrong.double().mean()) < 0.3
    assert float(risk.mean()) == pytest.approx(float(wrong.double().mean()), abs=0.03)
    kept = wrong[risk.argsort()].double().cumsum(0) / torch.arange(1, 4001)
    assert kept[799] < kept[1999] < kept[3199] < kept[3799] < kept[3999]


def test_padding_is_not_read_and_the_right_expert_is():
    code, answers = Code([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]), answers_of(0.1)
    answers = Answers(answers.experts, code.encode(answers.experts) + 0.1)
    answers.experts[2, :, 3] = 0.0
    decoder = make_decoder("ridge", code, [2, 0]).fit(answers)
    decoded = decoder.decode(answers)
    for place, expert in enumerate((2, 0)):
        wanted = decoding_risk(decoded[place, :, :3], decoder.errors[place, :3, :3])
        assert torch.equal(decoder.risk(expert, decoded[place], 3), wanted)


@pytest.mark.parametrize("fitted_on", ["all", "own"])
def test_the_errors_are_those_of_fits_without_the_sample(fitted_on):
    answers = answers_of(0.3, 24)
    answers = Answers(answers.experts, answers.coded, tasks=torch.arange(24) % 3)
    decoder = make_decoder(DecoderConfig("ridge", fitted_on=fitted_on), uniform(3), [1]).fit(answers)
    chosen = answers if fitted_on == "all" else answers.select(answers.tasks == 1)
    (fit,) = decoder.fitted
    inputs, wanted = torch.cat([*chosen.coded, chosen.experts[0], chosen.experts[2]], 1), chosen.experts[1]
    total, count = torch.zeros(4, 4, dtype=torch.float64), chosen.num_samples
    scale = (inputs - inputs.mean(0)).square().mean().sqrt()
    for sample in range(count):
        rest = torch.arange(count) != sample
        x, y = inputs[rest] / scale, wanted[rest]
        centred = x - x.mean(0)
        solved = torch.linalg.solve(
            centred.T @ centred + fit.ridges[0] * torch.eye(12).double(), centred.T @ (y - y.mean(0))
        )
        error = wanted[sample] - y.mean(0) - (inputs[sample] / scale - x.mean(0)) @ solved
        total += error.outer(error)
    torch.testing.assert_close(decoder.errors[0], total / count, rtol=1e-6, atol=1e-10)


def test_a_decoder_that_has_seen_nothing_knows_no_risk():
    with pytest.raises(DecodingError, match="call fit with calibration answers"):
        make_decoder("linear", uniform(2), [0]).risk(0, torch.zeros(1, 3))
