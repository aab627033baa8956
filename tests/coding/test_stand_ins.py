"""Decoders that read no survivor: the lost expert's own head, and regressions from the coded models alone."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

from coin.coding import Answers, Code, DecoderConfig, convex, make_decoder
from coin.coding.decoder_state import decoder_state, decoders_state, restore_decoder, restore_decoders
from coin.coding.decoders import CORRECTION, kept_bytes
from coin.errors import DecodingError, NumericalError, StateError
from coin.files.safetensors import load_state, save_state

PAIR = Code([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
ALONE = [DecoderConfig("ridge", survivors=False), DecoderConfig("feature_ridge", survivors=False)]


def linear_system(code, samples, seed=0, width=5, classes=4):
    """Experts that share their body, so that every coded model has their features: answers and the experts' heads."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, width, generator=draw, dtype=torch.float64)
    maps = torch.Generator().manual_seed(99)
    heads = [
        tuple(torch.randn(*shape, generator=maps, dtype=torch.float64) for shape in ((classes, width), (classes,)))
        for _ in range(code.num_experts)
    ]
    own = torch.stack([features @ weight.T + bias for weight, bias in heads])
    return Answers(own, code.encode(own), [features] * len(heads), [features] * code.num_coded), heads


@settings(max_examples=30, deadline=None)
@given(data=st.data(), count=st.integers(1, 5), samples=st.integers(1, 9))
def test_a_body_that_all_share_is_read_exactly_whoever_is_lost(data, count, samples):
    code = convex(count, data.draw(st.integers(1, count)))
    erased = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    answers, heads = linear_system(code, samples)
    decoder = make_decoder("expert_head", code, erased, heads)
    wanted = answers.experts[erased]
    nothing = [feature[:, :0] for feature in answers.expert_features]
    gone = dataclasses.replace(answers, experts=torch.full_like(answers.experts, torch.nan), expert_features=nothing)
    torch.testing.assert_close(decoder.decode(gone), wanted, rtol=0, atol=1e-12)
    assert decoder.fit(answers).errors.abs().max() < 1e-20
    assert decoder.survivors == ()


def test_a_lost_expert_is_read_from_the_coded_model_that_weighs_it_most():
    answers, heads = linear_system(PAIR, 7)
    others = dataclasses.replace(answers, coded_features=[answers.coded_features[0], 10 + answers.coded_features[1]])
    decoder = make_decoder("expert_head", PAIR, [0, 1, 2], heads)
    found = decoder.decode(others)
    for expert, row in enumerate([1, 0, 0]):  # the first of equals
        weight, bias = heads[expert]
        torch.testing.assert_close(found[expert], others.coded_features[row] @ weight.T + bias)
    assert decoder.rows(2) == (0, 1)
    assert make_decoder("expert_head", PAIR, [2, 1], heads).rows(2) == (0,)


@pytest.mark.parametrize("config", ALONE, ids=lambda config: config.name)
def test_a_regression_alone_is_that_of_the_coded_models_answers(config):
    """It reads no survivor, knows no budget, and for several experts is what it is for each."""
    (calibration, _), (test, _) = linear_system(PAIR, 40), linear_system(PAIR, 9, seed=1)
    gone = dataclasses.replace(
        test,
        experts=torch.full_like(test.experts, torch.nan),
        expert_features=[feature[:, :0] for feature in test.expert_features],
    )
    every = make_decoder(config, PAIR, [2, 0, 1]).fit(calibration)
    assert every.widths == make_decoder(config, PAIR, [1]).fit(calibration).widths
    for place, expert in enumerate(every.erased):
        own = make_decoder(config, PAIR, [expert]).fit(calibration)
        torch.testing.assert_close(every.decode(gone)[place], own.decode(gone)[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(every.errors[place], own.errors[0], rtol=1e-6, atol=1e-12)
    plain = make_decoder(dataclasses.replace(config, survivors=True), PAIR, [2, 0, 1]).fit(calibration)
    assert torch.equal(plain.decode(gone), every.decode(gone))  # with all lost there is no survivor anyway
    with pytest.raises(DecodingError, match="no survivor is read and no coded model answers"):
        make_decoder(config, PAIR, [0]).fit(calibration.without_coded())


def test_what_a_stand_in_costs():
    (answers, heads), names = linear_system(PAIR, 40), ("linear", "ridge", "feature_ridge", "expert_head")
    configs = [*map(DecoderConfig.named, names), *ALONE]
    assert [config.forwards(3, 2) for config in configs] == [4, 4, 4, 1, 2, 2]
    assert [config.forwards(3, 2, 2) for config in configs] == [3, 3, 3, 1, 2, 2]
    assert [config.losses(3, 2) for config in configs] == [2, 2, 2, 3, 3, 3]
    assert DecoderConfig("ridge").forwards(3, 0) == 2  # the survivors alone

    def kept(config, erasures):
        return kept_bytes(make_decoder(config, PAIR, erased, heads).fit(answers) for erased in erasures)

    singles = [(0,), (1,), (2,)]
    map_bytes = lambda inputs: 8 * (4 * inputs + inputs + 4)  # noqa: E731
    assert kept("linear", singles) == 0
    assert kept("expert_head", singles) == kept("expert_head", PAIR.erasures()) == 3 * 8 * 4 * (5 + 1)
    assert kept(ALONE[0], singles) == kept(ALONE[0], PAIR.erasures()) == 3 * map_bytes(2 * 4)
    assert kept("ridge", singles) == 3 * map_bytes(4 * 4)
    assert kept("ridge", PAIR.erasures()) == 3 * map_bytes(4 * 4) + 3 * 8 * (8 * 12 + 12 + 8)


def test_heads_are_read_back_to_the_last_bit_and_only_the_lost_experts(tmp_path):
    answers, heads = linear_system(PAIR, 30)
    decoders = [make_decoder("expert_head", PAIR, erased, heads) for erased in ([2, 0], [1], [0, 1, 2])]
    decoders[0].fit(answers)
    state, rests = decoders_state(decoders)
    assert {name for name in state if name.startswith("1/")} == {"1/heads.1.weight", "1/heads.1.bias"}
    save_state(tmp_path / "heads.safetensors", state, {"decoders": rests})
    state, told = load_state(tmp_path / "heads.safetensors")
    for found, decoder in zip(restore_decoders(state, told["decoders"], PAIR), decoders, strict=True):
        assert torch.equal(found.decode(answers), decoder.decode(answers))
        assert (found.erased, found.row_of, found.nbytes) == (decoder.erased, decoder.row_of, decoder.nbytes)
    assert torch.equal(restore_decoder(*decoder_state(decoders[0]), PAIR).errors, decoders[0].errors)
    state, rest = decoder_state(decoders[1])
    for message, wrong in {
        "'heads.1.bias'": {"heads.1.weight": state["heads.1.weight"]},
        "no such tensor": {**state, "heads.0.bias": torch.ones(4)},
        r"found \[3\]|expected \[3, 5\]": {**state, "heads.1.bias": torch.ones(3)},
    }.items():
        with pytest.raises(StateError, match=message):
            restore_decoder(wrong, rest, PAIR)


def shifted_system(samples):
    """Coded features that are off, answers in a type of their own for every task's samples, and the experts' heads."""
    answers, heads = linear_system(PAIR, samples)
    draw = torch.Generator().manual_seed(7)
    off = [
        each @ torch.randn(5, 5, generator=draw, dtype=torch.float64) + torch.randn(samples, 5, generator=draw)
        for each in answers.coded_features
    ]
    tasks = torch.arange(samples) % 3
    return dataclasses.replace(answers, coded_features=off, tasks=tasks), heads


def corrected(features, wanted, weight, bias):
    """The head after one ridge regression of what it misses, written out."""
    mean, missed = features.mean(0), wanted - features @ weight.T - bias
    a, r = features - mean, missed - missed.mean(0)
    gram = a.T @ a
    ridge = 10**CORRECTION * gram.trace() / min(len(a) - 1, 5)
    step = torch.linalg.solve(gram + ridge * torch.eye(5, dtype=torch.float64), a.T @ r).T
    return weight + step, bias + missed.mean(0) - step @ mean


OWN_HEAD = DecoderConfig.named("expert_head-own")


def test_a_corrected_head_is_a_ridge_regression_of_what_it_misses_on_its_own_task():
    answers, heads = shifted_system(60)
    decoder = make_decoder(OWN_HEAD, PAIR, [2, 0], heads).fit(answers)
    assert sum(decoder.samples_read.values()) == 40
    for place, expert in enumerate([2, 0]):
        own = answers.tasks == expert
        features, wanted = answers.coded_features[decoder.row_of[expert]], answers.experts[expert]
        weight, bias = corrected(features[own], wanted[own], *heads[expert])
        torch.testing.assert_close(decoder.decode(answers)[place], features @ weight.T + bias)
        left_out = []
        for sample in own.nonzero().flatten().tolist():
            others = own.clone()
            others[sample] = False
            # The ridge of all samples, in absolute numbers, is that of the fits without one.
            full = features[own] - features[own].mean(0)
            ridge = 10**CORRECTION * full.square().sum() / 5
            mean = features[others].mean(0)
            a = features[others] - mean
            missed = wanted[others] - features[others] @ heads[expert][0].T - heads[expert][1]
            system = a.T @ a + ridge * torch.eye(5, dtype=torch.float64)
            step = torch.linalg.solve(system, a.T @ (missed - missed.mean(0))).T
            found = features[sample] @ heads[expert][0].T + heads[expert][1] + missed.mean(0)
            left_out.append(wanted[sample] - found - step @ (features[sample] - mean))
        errors = torch.stack(left_out)
        torch.testing.assert_close(decoder.errors[place], errors.T @ errors / len(errors))


def test_a_corrected_head_is_kept_as_it_is_and_one_that_is_right_stays():
    answers, heads = shifted_system(60)
    small = [(weight.float(), bias.float()) for weight, bias in heads]
    decoder = make_decoder(OWN_HEAD, PAIR, [0, 1], small).fit(answers)
    assert {tensor.dtype for tensor in decoder.tensors.values()} == {torch.float32}
    restored = restore_decoder(*decoder_state(decoder), PAIR)
    assert torch.equal(restored.decode(answers), decoder.decode(answers))
    twice = decoder.decode(answers)
    assert torch.equal(decoder.fit(answers).decode(answers), twice)
    exact, heads = linear_system(PAIR, 60)
    exact = dataclasses.replace(exact, tasks=answers.tasks)
    right = make_decoder(OWN_HEAD, PAIR, [0, 1], heads).fit(exact)
    torch.testing.assert_close(right.decode(exact), exact.experts[[0, 1]], rtol=0, atol=1e-12)


def test_a_corrected_head_needs_calibration_answers_of_its_own_task():
    answers, heads = shifted_system(60)
    decoder = make_decoder(OWN_HEAD, PAIR, [0], heads)
    with pytest.raises(DecodingError, match="expert_head-own decoder is not fitted; call fit"):
        decoder.decode(answers)
    with pytest.raises(DecodingError, match="do not tell their tasks"):
        decoder.fit(dataclasses.replace(answers, tasks=None))
    with pytest.raises(NumericalError, match="found 1 calibration samples of expert 0's own task"):
        decoder.fit(answers.select(torch.arange(2)))


def test_what_it_cannot_read_is_told_in_one_line():
    answers, heads = linear_system(PAIR, 5)
    decoder = make_decoder("expert_head", PAIR, [0], heads)
    without = dataclasses.replace(answers, expert_features=None, coded_features=None)
    narrow = dataclasses.replace(answers, coded_features=[feature[:, :3] for feature in answers.coded_features])
    for message, which, read in (
        ("found answers without features", decoder, without),
        (r"found 3 features of coded model 1, the head of expert 0 reads 5; use", decoder, narrow),
        ("found answers of 1 coded models, expert_head reads number 1", decoder, answers.with_coded([0])),
        ("has no heads; make it with", make_decoder("expert_head", PAIR, [0]), answers),
    ):
        with pytest.raises(DecodingError, match=message) as refused:
            which.decode(read)
        assert "\n" not in str(refused.value)
