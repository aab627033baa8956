"""Decoders: which answers they read, what they decode of them, what they cost and refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from coin.coding import (
    Answers,
    Code,
    Decoder,
    DecoderKind,
    decode_linear,
    distinct_decoders,
    make_decoder,
)
from coin.coding.ridge import fit_blocks
from coin.errors import ConfigurationError, DecodingError, NumericalError, StateError

CODES = {
    "two": [[0.5, 0.5]],
    "three": [[0.2, 0.3, 0.5]],
    "two rows": [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]],
    "two rows of four": [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]],
}
TWO_ROWS = Code(CODES["two rows"])
CLASSES = 4
WIDTH = 5
FITTED = ("ridge", "feature_ridge")


class Drawn:
    """Random tensors in float64."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


@pytest.fixture
def heads():
    """The heads of four experts, the second with one class less."""
    drawn = Drawn(99)
    counts = (CLASSES, CLASSES - 1, CLASSES, CLASSES)
    return [(drawn(classes, WIDTH), drawn(classes)) for classes in counts]


@pytest.fixture
def answers_of(heads):
    """Return a function that gives answers of experts that share their body, which coded models have too."""

    def make(matrix, samples=60, seed=0):
        code = Code(matrix)
        features = Drawn(seed)(samples, WIDTH)
        own = []
        for weight, bias in heads[: code.num_experts]:
            logits = features @ weight.T + bias
            own.append(pad(logits, (0, CLASSES - len(bias))))
        experts = torch.stack(own)
        coded = code.encode(experts)
        return Answers(experts, coded, [features] * len(experts), [features] * len(coded))

    return make


def noisy(seed):
    """Return answers of three experts and two coded models, noisy so that ridges matter, and unrelated features."""
    drawn = Drawn(seed)
    experts = drawn(3, 90, CLASSES)
    coded = TWO_ROWS.encode(experts) + 0.3 * drawn(2, 90, CLASSES)
    features = [drawn(90, WIDTH) for _ in range(5)]
    return Answers(experts, coded, features[:3], features[3:])


def lose(answers, erased):
    """Return the answers with NaN where lost experts would have answered, and without their features."""
    experts = answers.experts.clone()
    features = list(answers.expert_features)
    for expert in erased:
        experts[expert] = torch.nan
        features[expert] = features[expert][:, :0]
    return replace(answers, experts=experts, expert_features=features)


@pytest.mark.parametrize("matrix", CODES.values(), ids=CODES.keys())
@pytest.mark.parametrize("kind", DecoderKind)
def test_exact_answers_are_decoded_for_every_loss_in_the_order_of_its_names(
    matrix, kind, answers_of, heads
):
    tolerance = 1e-5 if kind in FITTED else 1e-10  # the least ridge of the grid is not zero
    code = Code(matrix)
    calibration = answers_of(matrix)
    test = answers_of(matrix, samples=9, seed=1)
    single = replace(test, experts=test.experts.float(), coded=test.coded.float())
    for erased in code.erasures():
        backwards = list(erased[::-1])
        decoder = make_decoder(kind, code, backwards, heads).fit(calibration)
        decoded = decoder.decode(lose(test, backwards))
        expected = test.experts[backwards]
        torch.testing.assert_close(decoded, expected, rtol=tolerance, atol=tolerance)
        assert decoder.decode(single).dtype == torch.float32


@pytest.mark.parametrize("matrix", CODES.values(), ids=CODES.keys())
def test_linear_is_least_squares_over_the_rows(matrix, answers_of):
    """For one row and one lost expert the paper's (f_c − Σ β_i f_i)/β_j."""
    answers = answers_of(matrix)
    answers.coded.add_(Drawn(2)(*answers.coded.shape))
    (decoded,) = make_decoder("linear", Code(matrix), [0]).decode(answers)
    rows = np.array(matrix)
    of_survivors = np.einsum("rn,nbc->rbc", rows[:, 1:], answers.experts[1:].numpy())
    of_lost = answers.coded.numpy() - of_survivors
    flat = of_lost.reshape(len(rows), -1)
    expected, *_ = np.linalg.lstsq(rows[:, :1], flat, rcond=None)
    np.testing.assert_allclose(decoded.flatten(), expected[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [[0, 1], [0], []])
@pytest.mark.parametrize("kind", FITTED)
def test_a_regression_is_ridge_from_all_that_arrives(kind, rows):
    """All logits are a block, and each network's features; each lost expert has a ridge."""
    calibration = noisy(0).with_coded(rows)
    test = noisy(1).with_coded(rows)

    def blocks(answers):
        logits = torch.cat([*answers.coded, answers.experts[1]], 1)
        if kind == "ridge":
            return [logits]
        return [logits, *answers.coded_features, answers.expert_features[1]]

    decoder = make_decoder(kind, TWO_ROWS, [2, 0]).fit(calibration)
    fit = fit_blocks(blocks(calibration), calibration.experts[[2, 0]])
    expected = fit(torch.cat(blocks(test), 1))
    first, second = decoder.decode(test)
    torch.testing.assert_close(torch.cat([first, second], 1), expected)
    assert decoder.passes(len(rows)) == (3 + len(rows)) * 90


def test_a_lost_expert_is_read_from_the_coded_model_that_weighs_it_most(answers_of, heads):
    answers = answers_of(CODES["two rows"])
    features = [answers.coded_features[0], 10 + answers.coded_features[1]]
    answers = replace(answers, coded_features=features)
    decoder = make_decoder("expert_head", TWO_ROWS, [0, 1, 2], heads)
    decoded = decoder.decode(answers)
    for expert, row in enumerate([1, 0, 0]):  # the first of equals
        weight, bias = heads[expert]
        expected = features[row] @ weight.T + bias
        torch.testing.assert_close(decoded[expert, :, : len(bias)], expected)
    assert not decoded[1, :, CLASSES - 1].any()
    silent = replace(answers, coded_features=[features[0][:, :0], features[1]])
    assert decoder.decode(silent)[1:, :, : CLASSES - 1].isnan().all()


# Kind: the networks whose answers are read where expert 0 is lost, forwards, losses, kept numbers.
COSTS = {
    "linear": ({1, 2, 3, 4}, 4, 2, 0),
    "ridge": ({1, 2, 3, 4}, 4, 2, 4 * 16 + 16 + 4),
    "feature_ridge": ({1, 2, 3, 4}, 4, 2, 4 * (16 + 20) + (16 + 20) + 4),
    "expert_head": ({4}, 1, 3, 4 * 5 + 4 + 1),
}


@pytest.mark.parametrize("kind", COSTS)
def test_what_a_decoder_reads_and_costs(kind, answers_of, heads):
    decoder = make_decoder(kind, TWO_ROWS, [0], heads).fit(answers_of(CODES["two rows"]))
    costs = (decoder.kind.forwards(3, 2), decoder.kind.losses(3, 2), decoder.nbytes / 8)
    assert (decoder.servers(2), *costs) == COSTS[kind]
    assert decoder.decodes([0])
    assert not decoder.decodes([1])
    several = make_decoder(kind, TWO_ROWS, [2, 0], heads)
    assert several.decodes([0, 2])
    assert several.decodes([0]) == (kind == "expert_head")


@pytest.mark.parametrize("kind", [*FITTED, "expert_head"])
def test_a_decoder_with_the_tensors_of_another_answers_to_the_last_bit(kind, heads):
    decoder = make_decoder(kind, TWO_ROWS, [2, 0], heads).fit(noisy(0))
    again = Decoder(decoder.kind, decoder.code, decoder.erased, decoder.tensors)
    assert torch.equal(again.decode(noisy(1)), decoder.decode(noisy(1)))


THREE = Code(CODES["three"])


def fitted(answers):
    return make_decoder("ridge", THREE, [0]).fit(answers)


MISUSE = {  # by message the error, and what is done with answers of three experts and a coded model
    "loss of experts 0, 1 with 1": (
        DecodingError,
        lambda answers: make_decoder("linear", THREE, [0, 1]),
    ),
    "found decoder='cubic'": (
        ConfigurationError,
        lambda answers: make_decoder("cubic", THREE, [0]),
    ),
    "yet; call fit": (
        DecodingError,
        lambda answers: make_decoder("ridge", THREE, [0]).decode(answers),
    ),
    "make it with the lost experts' heads": (
        DecodingError,
        lambda answers: make_decoder("expert_head", THREE, [0]).decode(answers),
    ),
    "found answers without features": (
        DecodingError,
        lambda answers: make_decoder("feature_ridge", THREE, [0]).fit(
            Answers(answers.experts, answers.coded)
        ),
    ),
    "no survivor is read and no coded model answers; lose fewer": (
        DecodingError,
        lambda answers: make_decoder("ridge", THREE, [0, 1, 2]).fit(answers.with_coded([])),
    ),
    "answers of 2 experts, the decoder is for 3; keep the lost ones' places": (
        DecodingError,
        lambda answers: fitted(answers).decode(Answers(answers.experts[:2], answers.coded)),
    ),
    "found answers of 8 numbers, expected 12, as fitted; fit it on answers of the same servers": (
        DecodingError,
        lambda answers: fitted(answers).decode(answers.with_coded([])),
    ),
    "found 1 calibration samples": (
        NumericalError,
        lambda answers: fitted(answers.select(slice(0, 1))),
    ),
    "calibration is not finite: tensor 'inputs'": (
        StateError,
        lambda answers: fitted(lose(answers, [1])),
    ),
}


@pytest.mark.parametrize("message", MISUSE)
def test_misuse_is_one_clear_error(message, answers_of):
    error, misuse = MISUSE[message]
    with pytest.raises(error, match=message):
        misuse(answers_of(CODES["three"]))


@pytest.mark.parametrize("rows", [1, 2])
def test_dependent_equations_are_refused(rows):
    matrix = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)[:rows]
    with pytest.raises(DecodingError, match=rf"the loss of experts 0, 1 with {rows} coded models"):
        decode_linear(matrix, torch.zeros(rows, 1, 1), torch.zeros(1, 1, 1), (0, 1))


def test_answers_of_servers_are_padded_and_silent_ones_are_nan():
    features = torch.randn(4, 6)
    logits = torch.randn(4, 3)
    found = Answers.of_servers([(features, logits), None, (features, logits[:, :2])], 2)
    assert torch.equal(found.experts[0], logits)
    assert found.experts[1].isnan().all()
    assert torch.equal(found.coded[0], pad(logits[:, :2], (0, 1)))
    assert [each.shape for each in found.expert_features] == [(4, 6), (4, 0)]
    assert torch.equal(found.coded_features[0], features)
    without = Answers.of_servers([(features[:, :0], logits)] * 3, 2)
    assert (without.expert_features, without.coded_features) == ([], [])


def test_answers_are_split_and_joined():
    answers = replace(noisy(0), tasks=torch.arange(90) % 3)
    first = answers.select(slice(0, 30))
    others = answers.select(torch.arange(30, 90))
    joined = Answers.concatenate([first, others])
    torch.testing.assert_close(vars(joined), vars(answers), rtol=0, atol=0)
    assert joined.with_coded([1]).num_coded == 1
    assert joined.with_coded([]).coded_features == []
    with pytest.raises(DecodingError, match="found the tasks of 1 of 2 batches"):
        Answers.concatenate([first, replace(others, tasks=None)])


WRONG_PARTS = {
    r"found tasks \[5\], expected \[60\]": {"tasks": torch.zeros(5)},
    r"features of \(3, 0\) .*expected those of all \(3, 1\), or none": {"coded_features": []},
    r"expected \[N, B, C\], \[R, B, C\]": {"coded": torch.zeros(1, 4, CLASSES)},
}


@pytest.mark.parametrize("message", WRONG_PARTS)
def test_answers_whose_parts_do_not_fit_are_refused(message, answers_of):
    with pytest.raises(DecodingError, match=message):
        replace(answers_of(CODES["three"]), **WRONG_PARTS[message])


def test_a_list_of_decoders_has_each_once():
    kinds = distinct_decoders(["ridge", "linear"])
    assert kinds == [DecoderKind.ridge, DecoderKind.linear]
    # A column of names in W&B's tables takes no enum beside strings.
    assert type(kinds[0].name) is str
    for wrong in (["ridge", DecoderKind.ridge], []):
        with pytest.raises(ConfigurationError, match="expected at least one and each once"):
            distinct_decoders(wrong)
