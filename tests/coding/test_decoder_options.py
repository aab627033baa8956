"""Lists of decoders, the answers that they read, and decoders that are read back."""

import dataclasses

import pytest
import torch

from coin.coding import Answers, Code, DecoderKind, distinct_decoders, make_decoder
from coin.errors import ConfigurationError, DecodingError

CODE = Code([[0.2, 0.3, 0.5]])
TWO_ROWS = Code([[0.2, 0.3, 0.5], [0.5, 0.3, 0.2]])


def noisy_answers(samples, seed, code=CODE, width=5):
    """Answers that are no exact function of one another."""
    draw, maps = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)

    def normal(*shape, draw=draw):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    hidden = normal(samples, 4)
    logits, features = [], []
    for _ in range(code.num_experts + code.num_coded):
        logits.append(hidden @ normal(4, 2, draw=maps) + 0.3 * normal(samples, 2))
        features.append(0.1 * (hidden @ normal(4, width, draw=maps) + 0.5 * normal(samples, width)))
    n = code.num_experts
    tasks = torch.randint(0, n, (samples,), generator=draw)
    return Answers(torch.stack(logits[:n]), torch.stack(logits[n:]), features[:n], features[n:], tasks)


def decoded(kind, calibration, test, erased=(1,), code=CODE):
    return make_decoder(kind, code, erased).fit(calibration).decode(test)


def test_a_list_of_decoders_has_no_repeats_and_is_not_empty():
    kinds = distinct_decoders(["ridge", "linear"])
    assert kinds == [DecoderKind.ridge, DecoderKind.linear]
    assert type(kinds[0].name) is str  # a column of names in W&B's tables takes no enum beside strings
    for wrong, message in (
        (["ridge", DecoderKind.ridge], "expected at least one and each once"),
        ([], "expected at least one"),
        (["cubic"], "found decoder='cubic', expected one of linear, ridge, feature_ridge"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            distinct_decoders(wrong)


@pytest.mark.parametrize("kind", ["ridge", "feature_ridge"])
def test_answers_of_other_servers_are_refused(kind):
    calibration, test = noisy_answers(60, 1), noisy_answers(9, 2)
    inputs = 6 if kind == "ridge" else 6 + 3 * 5
    others = {inputs - (2 if kind == "ridge" else 7): test.with_coded([])}
    if kind == "feature_ridge":
        narrow = [feature[:, :4] for feature in test.coded_features]
        others[inputs - 1] = dataclasses.replace(test, coded_features=narrow)
    for found, other in others.items():
        message = f"found answers of {found} numbers, expected {inputs}, as fitted; fit it on answers of"
        with pytest.raises(DecodingError, match=message):
            decoded(kind, calibration, other)
    with pytest.raises(DecodingError, match="no survivor is read and no coded model answers"):
        make_decoder(kind, CODE, [0, 1, 2]).fit(calibration.with_coded([]))


def test_answers_of_servers_are_padded_and_silent_ones_have_none():
    draw = torch.Generator().manual_seed(0)
    features, logits = torch.randn(4, 6, generator=draw), torch.randn(4, 3, generator=draw)
    found = Answers.of_servers([(features, logits), None, (features, logits[:, :2])], 2)
    assert torch.equal(found.experts[0], logits)
    assert bool(found.experts[1].isnan().all())
    assert torch.equal(found.coded[0], torch.nn.functional.pad(logits[:, :2], (0, 1)))
    assert [feature.shape for feature in found.expert_features] == [(4, 6), (4, 0)]
    assert torch.equal(found.coded_features[0], features)
    assert Answers.of_servers([(features[:, :0], logits)] * 3, 2).expert_features == []


def test_answers_check_their_parts_which_join_and_split():
    answers = noisy_answers(7, 1)
    for change, message in (
        ({"tasks": torch.zeros(5, dtype=torch.int64)}, r"found tasks \[5\], expected \[7\]"),
        ({"coded_features": []}, "or none"),
        ({"coded": answers.coded[:, :4]}, r"expected \[N, B, C\]"),
    ):
        with pytest.raises(DecodingError, match=message):
            dataclasses.replace(answers, **change)
    joined = Answers.concatenate([answers.select(slice(0, 3)), answers.select(torch.tensor([3, 4, 5, 6]))])
    assert torch.equal(joined.experts, answers.experts)
    assert torch.equal(joined.coded, answers.coded)
    assert torch.equal(joined.coded_features[0], answers.coded_features[0])
    for other in (joined, answers.with_coded([]), answers.with_coded([0])):
        assert torch.equal(other.tasks, answers.tasks)
    assert answers.with_coded([]).coded_features == []


@pytest.mark.parametrize("kind", ["ridge", "feature_ridge"])
@pytest.mark.parametrize("erased", [(1,), (2, 0)])
def test_a_decoder_takes_the_tensors_of_a_fitted_one_and_answers_to_the_last_bit(kind, erased):
    decoder = make_decoder(kind, TWO_ROWS, erased)
    assert not decoder.tensors
    decoder.fit(noisy_answers(90, 0, TWO_ROWS))
    assert set(decoder.tensors) == {"coefficients", "input_mean", "target_mean"}  # no more with more samples
    copies = {name: tensor.clone() for name, tensor in decoder.tensors.items()}
    again = dataclasses.replace(decoder, tensors=copies)
    for size in (1, 2, 7, 40):
        test = noisy_answers(size, 1, TWO_ROWS)
        assert torch.equal(again.decode(test), decoder.decode(test))
    assert again.nbytes == decoder.nbytes > 0
