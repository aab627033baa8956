"""Which servers stand in for an expert, and what is decoded from their replies."""

import pytest
import torch

from coin.coding import Answers, Code, decode_linear, make_decoder
from coin.serving.policies import PolicyKind, StandIns
from coin.serving.servers import Reply
from coin.serving.system import System
from tests.serving.conftest import LinearSystem

CODE = Code([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
SUFFICE = [  # policy, expert, servers, and whether they make up for it
    ("coded_hedged", 1, "a c coded-0", True),
    ("coded_hedged", 1, "a coded-0 coded-1", True),
    ("coded_hedged", 1, "a coded-0", False),
    ("coded_hedged", 0, "b c coded-1", False),  # it is not in the second row
    ("standin", 0, "coded-0", True),
    ("standin", 0, "a coded-1", False),
    ("standin", 2, "coded-1", True),
    ("replica", 1, "replica-1", True),
    ("replica", 1, "a", False),
    ("uncoded", 0, "a b c", False),
]


@pytest.mark.parametrize(("policy", "expert", "servers", "expected"), SUFFICE)
def test_which_servers_suffice(policy, expert, servers, expected):
    stand_ins = StandIns(PolicyKind(policy), ["a", "b", "c"], CODE)
    assert stand_ins.suffice(expert, servers.split()) == expected


@pytest.mark.parametrize(
    ("policy", "adapted", "expected"),
    [("standin", False, 0), ("standin", True, 1), ("replica", False, 1)],
)
def test_as_which_expert_a_server_is_asked(policy, adapted, expected):
    stand_ins = StandIns(PolicyKind(policy), ["a", "b"], Code([[0.5, 0.5]]), adapted)
    assert [stand_ins.asked_as(name, 1) for name in stand_ins.servers] == [0, 0, expected]


@pytest.fixture
def biased():
    """A system with a decoder of the second expert's loss, and replies whose bias it knows but the code does not."""
    it = LinearSystem(CODE.matrix.tolist(), "coded_hedged")
    inputs = torch.randn(40, 2, generator=torch.Generator().manual_seed(1)).double()
    replies = {}
    for name in it.stand_ins.servers:
        own = it.reply(name, 0, inputs).logits
        replies[name] = Reply(own + 0.5 if "coded" in name else own, own.repeat(1, 2))
    logits = torch.stack([reply.logits for reply in replies.values()])
    features = [reply.features for reply in replies.values()]
    answers = Answers(logits[:3], logits[3:], features[:3], features[3:])
    decoder = make_decoder("feature_ridge", it.code, [1]).fit(answers)
    return System(it.system.classes, {}, it.stand_ins, {(1,): decoder}, True), replies, answers


def without(replies, *lost):
    return {name: reply for name, reply in replies.items() if name not in lost}


def test_the_decoder_of_the_missing_experts_decodes(biased):
    system, replies, answers = biased
    found = system.decode(1, without(replies, "e1"))
    torch.testing.assert_close(found.logits, answers.experts[1], rtol=0, atol=1e-4)
    assert found.answered_by == ("e0", "e2", "coded-0", "coded-1")
    assert not found.accepted.any()  # nothing was promised


@pytest.mark.parametrize(
    ("lost", "rows", "present"), [(["e1", "coded-1"], [0], [0, 2]), (["e0", "e1"], [0, 1], [2])]
)
def test_without_a_decoder_or_all_coded_models_the_code_decodes(biased, lost, rows, present):
    system, replies, answers = biased
    missing = tuple(expert for expert in range(3) if expert not in present)
    coded = answers.coded[rows]
    expected = decode_linear(CODE.matrix[rows], coded, answers.experts[present], missing)
    for expert, logits in zip(missing, expected, strict=True):
        found = system.decode(expert, without(replies, *lost))
        torch.testing.assert_close(found.logits, logits)


def test_what_is_promised_is_told(biased):
    system, replies, answers = biased
    assert system.promise is None
    system.decoders[1,].accept(answers, 0.2)
    assert system.promise.alpha == 0.2
    found = system.decode(1, without(replies, "e1"))
    assert found.accepted.any()
