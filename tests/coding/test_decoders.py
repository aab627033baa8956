"""Decoders: which answers they read, what they decode of them, what they cost and refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from coin.coding import (
    Answers,
    Code,
    Decoder,
    DecoderKind,
    decode_linear,
    distinct_decoders,
    make_decoder,
)
from coin.errors import ConfigurationError, DecodingError, NumericalError, StateError

CODES = {
    "two": [[0.5, 0.5]],
    "three": [[0.2, 0.3, 0.5]],
    "two rows": [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]],
    "two rows of four": [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]],
}
CLASSES = 4
WIDTH = 5
FITTED = ("ridge", "feature_ridge")


@pytest.fixture
def heads():
    """The heads of four experts, the second with one class less."""
    draw = torch.Generator().manual_seed(99)
    made = []
    for classes in (CLASSES, CLASSES - 1, CLASSES, CLASSES):
        weight = torch.randn(classes, WIDTH, generator=draw, dtype=torch.float64)
        bias = torch.randn(classes, generator=draw, dtype=torch.float64)
        made.append((weight, bias))
    return made


@pytest.fixture
def answers_of(heads):
    """Return a function that gives answers of experts that share their body, which coded models have too."""

    def make(matrix, samples=60, seed=0):
        code = Code(matrix)
        draw = torch.Generator().manual_seed(seed)
        features = torch.randn(samples, WIDTH, generator=draw, dtype=torch.float64)
        own = torch.zeros(code.num_experts, samples, CLASSES, dtype=torch.float64)
        for logits, (weight, bias) in zip(own, heads, strict=False):
            logits[:, : len(bias)] = features @ weight.T + bias
        return Answers(
            own, code.encode(own), [features] * code.num_experts, [features] * code.num_coded
        )

    return make


def lose(answers, erased):
    """Return the answers with NaN where lost experts would have answered, and without their features."""
    experts = answers.experts.clone()
    experts[list(erased)] = torch.nan
    features = list(answers.expert_features)
    for expert in erased:
        features[expert] = features[expert][:, :0]
    return replace(answers, experts=experts, expert_features=features)


@pytest.mark.parametrize("matrix", CODES.values(), ids=CODES.keys())
@pytest.mark.parametrize("kind", list(DecoderKind))
def test_exact_answers_are_decoded_for_every_loss_in_the_order_of_its_names(
    matrix, kind, answers_of, heads
):
    code = Code(matrix)
    # The least ridge of the grid is not zero.
    close = {"rtol": 1e-5, "atol": 1e-5} if kind in FITTED else {"rtol": 1e-10, "atol": 1e-10}
    test = answers_of(matrix, samples=9, seed=1)
    for erased in code.erasures():
        backwards = erased[::-1]
        decoder = make_decoder(kind, code, backwards, heads).fit(answers_of(matrix))
        decoded = decoder.decode(lose(test, backwards))
        torch.testing.assert_close(decoded, test.experts[list(backwards)], **close)
        single = replace(test, experts=test.experts.float(), coded=test.coded.float())
        assert decoder.decode(single).dtype == torch.float32


@pytest.mark.parametrize("matrix", CODES.values(), ids=CODES.keys())
def test_linear_is_least_squares_over_the_rows(matrix, answers_of):
    """For one row and one lost expert the paper's (f_c − Σ β_i f_i)/β_j."""
    answers = answers_of(matrix)
    answers.coded.add_(torch.randn(answers.coded.shape, generator=torch.Generator().manual_seed(2)))
    decoded = make_decoder("linear", Code(matrix), [0]).decode(answers)[0]
    rows = np.array(matrix)
    of_survivors = np.einsum("rn,nbc->rbc", rows[:, 1:], answers.experts[1:].numpy())
    of_lost = (answers.coded.numpy() - of_survivors).reshape(len(rows), -1)
    expected = np.linalg.lstsq(rows[:, :1], of_lost, rcond=None)[0]
    np.testing.assert_allclose(decoded.numpy().reshape(1, -1), expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def noisy(answers_of):
    """Return a function that gives answers with noise in all of them, so that ridges matter."""

    def make(seed, samples=90):
        answers = answers_of(CODES["two rows"], samples, seed)
        draw = torch.Generator().manual_seed(100 + seed)

        def disturbed(tensor):
            return tensor + 0.3 * torch.randn(tensor.shape, generator=draw, dtype=torch.float64)

        return Answers(
            disturbed(answers.experts),
            disturbed(answers.coded),
            [0.1 * disturbed(each) for each in answers.expert_features],
            [0.1 * disturbed(each) for each in answers.coded_features],
        )

    return make


@pytest.mark.parametrize("rows", [[0, 1], [0], []])
@pytest.mark.parametrize("kind", FITTED)
def test_a_regression_is_ridge_from_all_that_arrives(kind, rows, noisy):
    """Of blocks divided by their deviation: all logits, and each network's features; each lost expert has a ridge."""
    calibration = noisy(0).with_coded(rows)
    test = noisy(1).with_coded(rows)
    decoder = make_decoder(kind, Code(CODES["two rows"]), [2, 0]).fit(calibration)

    def blocks(answers):
        logits = torch.cat([*answers.coded, answers.experts[1]], 1)
        features = [*answers.coded_features, answers.expert_features[1]]
        return [logits, *features] if kind == "feature_ridge" else [logits]

    scaled = []
    for block, new in zip(blocks(calibration), blocks(test), strict=True):
        deviation = (block - block.mean(0)).square().mean().sqrt()
        scaled.append(torch.cat([block - block.mean(0), new - block.mean(0)]) / deviation)
    both = torch.cat(scaled, 1).numpy()
    x, new = both[:90], both[90:]
    squares = np.linalg.svd(x, compute_uv=False) ** 2
    for place, expert in enumerate((2, 0)):
        y = calibration.experts[expert].numpy()
        predictions = {}
        for ridge in squares[squares > 1e-20].mean() * 10.0 ** np.arange(-10, 2.25, 0.5):
            inverse = np.linalg.inv(x.T @ x + ridge * np.eye(x.shape[1]))
            hat = x @ inverse @ x.T + 1 / len(x)
            residual = y - y.mean(0) - x @ inverse @ x.T @ (y - y.mean(0))
            left_out = residual / (1 - np.diag(hat))[:, None]
            predictions[(left_out**2).sum()] = new @ inverse @ x.T @ (y - y.mean(0)) + y.mean(0)
        best = predictions[min(predictions)]
        np.testing.assert_allclose(decoder.decode(test)[place].numpy(), best, rtol=1e-6, atol=1e-8)
    assert decoder.passes(len(rows)) == (3 + len(rows)) * 90


def test_a_lost_expert_is_read_from_the_coded_model_that_weighs_it_most(answers_of, heads):
    code = Code(CODES["two rows"])
    answers = answers_of(CODES["two rows"])
    features = [answers.coded_features[0], 10 + answers.coded_features[1]]
    decoder = make_decoder("expert_head", code, [0, 1, 2], heads)
    decoded = decoder.decode(replace(answers, coded_features=features))
    for expert, row in enumerate([1, 0, 0]):  # the first of equals
        weight, bias = heads[expert]
        expected = features[row] @ weight.T + bias
        torch.testing.assert_close(decoded[expert, :, : len(bias)], expected)
    assert not decoded[1, :, CLASSES - 1 :].any()
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
    code = Code(CODES["two rows"])
    decoder = make_decoder(kind, code, [0], heads).fit(answers_of(CODES["two rows"]))
    servers, forwards, losses, numbers = COSTS[kind]
    assert decoder.servers(2) == servers
    assert decoder.kind.forwards(3, 2) == forwards
    assert decoder.kind.losses(3, 2) == losses
    assert decoder.nbytes == 8 * numbers
    assert decoder.decodes([0])
    assert not decoder.decodes([1])
    several = make_decoder(kind, code, [2, 0], heads)
    assert several.decodes([0, 2])
    assert several.decodes([0]) == (kind == "expert_head")


@pytest.mark.parametrize("kind", [*FITTED, "expert_head"])
def test_a_decoder_with_the_tensors_of_another_answers_to_the_last_bit(kind, noisy, heads):
    decoder = make_decoder(kind, Code(CODES["two rows"]), [2, 0], heads).fit(noisy(0))
    tensors = {name: tensor.clone() for name, tensor in decoder.tensors.items()}
    again = Decoder(decoder.kind, decoder.code, decoder.erased, tensors)
    assert torch.equal(again.decode(noisy(1)), decoder.decode(noisy(1)))


MISUSE = {
    "past the code": (
        lambda a: make_decoder("linear", a.code, [0, 1]),
        DecodingError,
        "loss of experts 0, 1 with 1",
    ),
    "an unknown kind": (
        lambda a: make_decoder("cubic", a.code, [0]),
        ConfigurationError,
        "found decoder='cubic'",
    ),
    "not fitted": (
        lambda a: make_decoder("ridge", a.code, [0]).decode(a.whole),
        DecodingError,
        "yet; call fit",
    ),
    "no heads": (
        lambda a: make_decoder("expert_head", a.code, [0]).decode(a.whole),
        DecodingError,
        "make it with the lost experts' heads",
    ),
    "no features": (
        lambda a: make_decoder("feature_ridge", a.code, [0]).fit(a.logits_alone),
        DecodingError,
        "found answers without features",
    ),
    "nothing arrives": (
        lambda a: make_decoder("ridge", a.code, [0, 1, 2]).fit(a.whole.with_coded([])),
        DecodingError,
        "no survivor is read and no coded model answers; lose fewer",
    ),
    "other experts": (
        lambda a: a.fitted.decode(a.of_two),
        DecodingError,
        "answers of 2 experts, the decoder is for 3; keep the lost ones' places",
    ),
    "other servers": (
        lambda a: a.fitted.decode(a.whole.with_coded([])),
        DecodingError,
        "found answers of 8 numbers, expected 12, as fitted; fit it on answers of the same servers",
    ),
    "one sample": (
        lambda a: a.fitted.fit(a.whole.select(slice(0, 1))),
        NumericalError,
        "found 1 calibration samples",
    ),
    "NaN": (
        lambda a: a.fitted.fit(lose(a.whole, [1])),
        StateError,
        "calibration is not finite: tensor 'inputs'",
    ),
}


class Parts:
    """What the misuses are made of."""

    def __init__(self, answers_of):
        self.code = Code(CODES["three"])
        self.whole = answers_of(CODES["three"])
        self.logits_alone = Answers(self.whole.experts, self.whole.coded)
        self.of_two = answers_of(CODES["two"])
        self.fitted = make_decoder("ridge", self.code, [0]).fit(self.whole)


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_one_clear_error(name, answers_of):
    misuse, error, message = MISUSE[name]
    with pytest.raises(error, match=message):
        misuse(Parts(answers_of))


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
    assert torch.equal(found.coded[0, :, :2], logits[:, :2])
    assert not found.coded[0, :, 2].any()
    assert [list(each.shape) for each in found.expert_features] == [[4, 6], [4, 0]]
    assert torch.equal(found.coded_features[0], features)
    without = Answers.of_servers([(features[:, :0], logits)] * 3, 2)
    assert (without.expert_features, without.coded_features) == ([], [])


def test_answers_are_split_and_joined(answers_of):
    answers = replace(answers_of(CODES["two rows"], 7), tasks=torch.arange(7) % 3)
    joined = Answers.concatenate([answers.select(slice(0, 3)), answers.select(torch.arange(3, 7))])
    for name, whole in vars(answers).items():
        torch.testing.assert_close(vars(joined)[name], whole, rtol=0, atol=0)
    assert joined.with_coded([1]).num_coded == 1
    assert joined.with_coded([]).coded_features == []


WRONG_PARTS = {
    "tasks": ({"tasks": torch.zeros(5)}, r"found tasks \[5\], expected \[60\]"),
    "features": (
        {"coded_features": []},
        r"features of \(3, 0\) .*expected those of all \(3, 1\), or none",
    ),
    "logits": ({"coded": torch.zeros(1, 4, CLASSES)}, r"expected \[N, B, C\], \[R, B, C\]"),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_answers_whose_parts_do_not_fit_are_refused(name, answers_of):
    change, message = WRONG_PARTS[name]
    with pytest.raises(DecodingError, match=message):
        replace(answers_of(CODES["three"]), **change)


def test_a_list_of_decoders_has_each_once():
    kinds = distinct_decoders(["ridge", "linear"])
    assert kinds == [DecoderKind.ridge, DecoderKind.linear]
    assert (
        type(kinds[0].name) is str
    )  # a column of names in W&B's tables takes no enum beside strings
    for wrong in (["ridge", DecoderKind.ridge], []):
        with pytest.raises(ConfigurationError, match="expected at least one and each once"):
            distinct_decoders(wrong)


def test_batches_of_known_and_of_unknown_tasks_are_not_joined():
    known = Answers(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4), tasks=torch.tensor([0, 1, 1]))
    unknown = Answers(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4))
    with pytest.raises(DecodingError, match="found the tasks of 1 of 2 batches"):
        Answers.concatenate([known, unknown])
