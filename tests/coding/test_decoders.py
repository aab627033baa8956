from dataclasses import replace
from itertools import product

import pytest
import torch

from coin.coding import Answers, Code, DecoderKind, decode_linear, make_decoder
from coin.errors import DecodingError, NumericalError, StateError

CODES = [
    [[0.5, 0.5]],
    [[0.2, 0.3, 0.5]],
    [[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]],
    [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]],
]


def exact_answers(code, samples=7, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(code.num_experts, samples, classes, generator=generator, dtype=torch.float64)
    return Answers(experts, code.encode(experts))


def lose(answers, erased):
    """The same answers with NaN wherever a lost expert would have answered."""
    experts = answers.experts.clone()
    experts[list(erased)] = torch.nan
    features = answers.expert_features
    if features is not None:
        features = [torch.full_like(f, torch.nan) if i in erased else f for i, f in enumerate(features)]
    return Answers(experts, answers.coded, features, answers.coded_features)


@pytest.mark.parametrize("matrix", [[[0.2, 0.3, 0.5]], [[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]]])
def test_linear_is_the_papers_formula_and_with_spare_rows_least_squares(matrix):
    code = Code(matrix)
    answers, b = exact_answers(code), code.matrix
    noisy = Answers(answers.experts, answers.coded + torch.randn(answers.coded.shape, generator=torch.manual_seed(1)))
    decoded = make_decoder("linear", code, [0]).decode(noisy)[0]
    wanted = noisy.coded - b[:, 1, None, None] * answers.experts[1] - b[:, 2, None, None] * answers.experts[2]
    expected = torch.linalg.lstsq(b[:, :1], wanted.reshape(len(b), -1)).solution.reshape(decoded.shape)
    torch.testing.assert_close(decoded, expected)
    if len(b) == 1:
        torch.testing.assert_close(decoded, wanted[0] / b[0, 0])


def test_linear_refuses_what_the_code_cannot_do():
    code = Code([[0.2, 0.3, 0.5]])
    with pytest.raises(DecodingError, match="the loss of experts 0, 1 with 1 coded models"):
        make_decoder("linear", code, (0, 1))
    dependent = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    for rows in (1, 2):
        with pytest.raises(DecodingError, match=rf"the loss of experts 0, 1 with {rows} coded models"):
            decode_linear(dependent[:rows], torch.zeros(rows, 1, 1), torch.zeros(1, 1, 1), (0, 1))


@pytest.mark.parametrize("matrix", CODES)
def test_exact_relations_are_recovered_for_every_erasure_in_the_order_of_its_names(matrix):
    code = Code(matrix)
    calibration, test = exact_answers(code, samples=60, seed=1), exact_answers(code, samples=9, seed=2)
    for erased in (each[::-1] for each in code.erasures()):
        wanted = test.experts[list(erased)]
        decoded = make_decoder("linear", code, erased).decode(lose(test, erased))
        torch.testing.assert_close(decoded, wanted, rtol=1e-10, atol=1e-10)
        # An intercept.
        shifted = [Answers(each.experts, each.coded + 100) for each in (calibration, lose(test, erased))]
        decoded = make_decoder(DecoderKind.ridge, code, erased).fit(shifted[0]).decode(shifted[1])
        torch.testing.assert_close(decoded, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["ridge", "feature_ridge"])
def test_calibrated_decoders_work_from_the_survivors_alone(kind):
    code, draw = Code([[0.2, 0.3, 0.5]]), {"generator": torch.Generator().manual_seed(3), "dtype": torch.float64}

    def dependent(samples):
        f, features = torch.randn(3, samples, 4, **draw), [torch.randn(samples, 5, **draw) for _ in range(4)]
        f[1] = 2 * f[0].flip(1) - f[2] + 1
        return Answers(f, code.encode(f), features[:3], features[3:]).with_coded([])

    decoder = make_decoder(kind, code, [1]).fit(dependent(80))
    test = dependent(6)
    torch.testing.assert_close(decoder.decode(lose(test, [1]))[0], test.experts[1], rtol=1e-6, atol=1e-6)


def test_features_read_out_what_logits_do_not_hold():
    code, draw = Code([[0.5, 0.5]]), {"generator": torch.Generator().manual_seed(4), "dtype": torch.float64}
    readout = torch.randn(6, 3, **draw)

    def answers(samples):
        f, features = torch.randn(2, samples, 3, **draw), [torch.randn(samples, 6, **draw) for _ in range(3)]
        f[0] = features[2] @ readout
        return Answers(f, torch.randn(1, samples, 3, **draw), features[:2], features[2:])

    calibration, test = answers(60), answers(8)
    decoded = make_decoder("feature_ridge", code, [0]).fit(calibration).decode(lose(test, [0]))
    torch.testing.assert_close(decoded[0], test.experts[0], rtol=1e-6, atol=1e-6)


def test_padded_classes_decode_to_zero():
    code = Code([[0.5, 0.5]])

    def padded(samples, seed):
        experts = exact_answers(code, samples, classes=5, seed=seed).experts.clone()
        experts[0, :, 3:] = 0
        return Answers(experts, code.encode(experts))

    for kind in ("linear", "ridge"):
        test = padded(6, 8)
        decoder = make_decoder(kind, code, [0]).fit(padded(40, 7))
        torch.testing.assert_close(decoder.decode(lose(test, [0]))[0], test.experts[0], rtol=1e-6, atol=1e-6)
        assert decoder.decode(Answers(test.experts.float(), test.coded.float())).dtype == torch.float32


def test_misuse_is_one_clear_error():
    code = Code([[0.5, 0.5]])
    answers = exact_answers(code)
    three = exact_answers(Code([[0.2, 0.3, 0.5]]))
    ridge = make_decoder("ridge", code, [0]).fit(answers)
    whole = replace(answers, expert_features=list(answers.experts), coded_features=list(answers.coded))
    head = make_decoder("expert_head", code, [0], [(torch.ones(3, 2), torch.ones(3))] * 2)
    for message, misuse in {
        "nothing to decode with yet; call fit": lambda: make_decoder("ridge", code, [0]).decode(answers),
        "without features": lambda: make_decoder("feature_ridge", code, [0]).fit(answers),
        "no coded model answers; lose fewer": lambda: make_decoder("ridge", code, [0, 1]).fit(answers.with_coded([])),
        "found answers without features": lambda: head.decode(answers),
        "make it with the lost experts' heads": lambda: make_decoder("expert_head", code, [0]).decode(whole),
        "3 experts, the decoder is for 2; keep the lost ones' places": lambda: ridge.fit(three),
    }.items():
        with pytest.raises(DecodingError, match=message):
            misuse()
    for kind, count in product(("ridge", "feature_ridge"), (0, 1)):
        with pytest.raises(NumericalError, match=f"found {count} calibration samples, expected at least 2"):
            make_decoder(kind, code, [0]).fit(whole.select(slice(0, count)))
    with pytest.raises(StateError, match="a decoder's calibration is not finite: tensor 'inputs'"):
        ridge.fit(lose(answers, [1]))
