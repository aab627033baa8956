"""The decoder that reads no survivor, the lost expert's own head, and what decoders cost."""

import dataclasses

import torch
from hypothesis import given, settings, strategies as st

from coin.coding import Answers, Code, Decoder, DecoderKind, convex, make_decoder

PAIR = Code([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])


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
    assert decoder.survivors == ()


def test_a_lost_expert_is_read_from_the_coded_model_that_weighs_it_most():
    answers, heads = linear_system(PAIR, 7)
    others = dataclasses.replace(answers, coded_features=[answers.coded_features[0], 10 + answers.coded_features[1]])
    decoder = make_decoder("expert_head", PAIR, [0, 1, 2], heads)
    found = decoder.decode(others)
    for expert, row in enumerate([1, 0, 0]):  # the first of equals
        weight, bias = heads[expert]
        torch.testing.assert_close(found[expert], others.coded_features[row] @ weight.T + bias)
    assert decoder.servers(2) == {3, 4}
    assert make_decoder("expert_head", PAIR, [2, 1], heads).servers(2) == {3}


def test_what_a_stand_in_costs():
    (answers, heads), names = linear_system(PAIR, 40), ("linear", "ridge", "feature_ridge", "expert_head")
    kinds = [*map(DecoderKind, names)]
    assert [kind.forwards(3, 2) for kind in kinds] == [4, 4, 4, 1]
    assert [kind.forwards(3, 2, 2) for kind in kinds] == [3, 3, 3, 1]
    assert [kind.losses(3, 2) for kind in kinds] == [2, 2, 2, 3]
    assert DecoderKind.ridge.forwards(3, 0) == 2  # the survivors alone

    def kept(kind, erased):
        return make_decoder(kind, PAIR, erased, heads).fit(answers).nbytes

    assert kept("linear", [0]) == 0
    assert kept("expert_head", [0, 1, 2]) == 3 * kept("expert_head", [0]) == 3 * (8 * 4 * (5 + 1) + 8)
    assert kept("ridge", [0]) == 8 * (4 * 16 + 16 + 4)
    assert kept("ridge", [0, 2]) == 8 * (8 * 12 + 12 + 8)


def test_heads_of_unequal_class_counts_are_padded_and_read_back_to_the_last_bit():
    answers, heads = linear_system(PAIR, 30)
    heads[1] = heads[1][0][:3], heads[1][1][:3]
    answers.experts[1, :, 3] = 0
    decoder = make_decoder("expert_head", PAIR, [1, 0], heads)
    torch.testing.assert_close(decoder.decode(answers), answers.experts[[1, 0]], rtol=0, atol=1e-12)
    again = Decoder(decoder.kind, PAIR, (1, 0), decoder.tensors)
    assert torch.equal(again.decode(answers), decoder.decode(answers))
    assert (again.rows, again.nbytes) == (decoder.rows, 8 * (3 + 4) * (5 + 1) + 2 * 8)
