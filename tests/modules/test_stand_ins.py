"""Systems and evaluations whose decoders read no survivor, and what they cost."""

import math
from pathlib import Path

import pytest
import torch
from closeness import close
from torch import nn

import coin
from coin.coding import Code, DecoderKind
from coin.errors import CoinWarning, HeadError, StateError
from coin.modules import Coded, DecodingEvaluator
from coin.networks import linear_heads

CODE = Code([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])


class Gone(nn.Module):
    def forward(self, x):
        raise RuntimeError("a server ran that nobody reads")


class Net(nn.Module):
    def __init__(self, body, outputs, after=None):
        super().__init__()
        self.body, self.head, self.after = body, nn.Linear(5, outputs).double(), after or nn.Identity()

    def forward(self, x):
        return self.after(self.head(self.body(x)))


@pytest.fixture
def system():
    """Three experts of different class counts on one body, which the coded models have too."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 5), nn.ReLU()).double()
    return Coded(CODE, [Net(body, outputs) for outputs in (4, 2, 3)], [Net(body, 4), Net(body, 4)])


@pytest.fixture
def inputs():
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_all_experts_may_be_lost_and_any_part_of_them(system, inputs):
    wanted = system.answers(inputs).experts
    assert system.fit_decoder(inputs.split(9), [0, 1, 2], "expert_head") is system
    system.experts = nn.ModuleList([Gone() for _ in wanted])
    decoded = system.decode(inputs)
    for logits, own, width in zip(decoded, wanted, (4, 2, 3), strict=True):
        torch.testing.assert_close(logits[:, :width], own[:, :width], rtol=0, atol=1e-12)
    for several in ([0], [1], [2], [0, 1], [1, 2], [2, 0]):
        part = system.decode(inputs, several)
        for logits, expert in zip(part, several, strict=True):
            width = system.classes[expert]
            assert close(logits[:, :width], decoded[expert, :, :width], sums=5)  # features
        assert close(system.score(part, several), system.score(decoded)[several], sums=5)


def test_only_what_is_read_runs(system, inputs):
    """Of the coded models the one with the largest weight alone, in fitting no survivor; a head needs no fit."""
    decoded = system.fit_decoder([], [1, 2], "expert_head").decode(inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(system.fit_decoder([], [1, 2], "expert_head").decode(inputs), decoded)
    assert not decoded.requires_grad
    assert all(parameter.requires_grad for parameter in system.parameters())
    system.experts, system.coded[1] = nn.ModuleList([Gone() for _ in range(3)]), Gone()
    with torch.inference_mode():
        assert torch.equal(system.decode(inputs), decoded)
    ran = []
    for place, expert in enumerate(fresh := [Net(nn.Linear(6, 5).double(), 3) for _ in range(3)]):
        expert.register_forward_hook(lambda _, given, __, place=place: ran.append((place, len(given[0]))))
    again = Coded(CODE, fresh, [Net(nn.Linear(6, 5).double(), 3) for _ in range(2)])
    again.fit_decoder(inputs.split(20), [1], "ridge")
    assert [size for _, size in ran] == [2] * 3 + [20] * 6  # two to count the classes


@pytest.mark.parametrize("after", [nn.Softmax(1), nn.ReLU()])
def test_heads_that_do_not_give_the_logits_are_refused_by_name(system, inputs, after):
    broken = torch.where(torch.arange(40)[:, None] == 1, torch.nan, inputs)
    with pytest.raises(StateError, match="an answer of Net is not finite: tensor 'logits' holds a NaN"):
        system.fit_decoder([broken], [0], "expert_head")
    odd = [Net(expert.body, 3, after) for expert in system.experts]
    system = Coded(CODE, [system.experts[0], *odd[1:]], list(system.coded))
    message = "the logits of Net are not its head 'head' of .*leave out what reads it"
    with pytest.raises(HeadError, match=message) as refused:
        system.fit_decoder([inputs], [0], "expert_head")
    assert "\n" not in str(refused.value)
    tests = [[(inputs, torch.arange(40) % 3)]] * 3
    for options in ({"calibration": [[inputs]] * 3}, {}):
        with pytest.raises(HeadError, match="'head'"):
            coin.evaluate(system, tests, decoders=["expert_head"], **options)
    with pytest.warns(CoinWarning, match="expert_head is left out: the logits of Net are not its head"):
        table = coin.evaluate(system, tests, calibration=[[inputs]] * 3)
    assert set(table.decoder) == {kind for kind in DecoderKind if kind != "expert_head"}


def test_heads_are_read_as_they_are():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 2, bias=False), nn.Linear(4, 3)
    (weight, bias), (other, _) = linear_heads([first, second], torch.randn(2, 4))
    assert torch.equal(weight, first.weight)
    assert torch.equal(bias, torch.zeros(2))
    assert torch.equal(other, second.weight)
    assert not weight.requires_grad


@pytest.fixture
def parts(write_experts, write_coded, tasks_of):
    experts = write_experts((3, 2, 3))
    return experts, write_coded(CODE.matrix.tolist(), experts), tasks_of((3, 2, 3))


def test_the_evaluator_measures_them_and_what_they_cost(parts, make_trainer):
    experts, paths, tasks = parts
    evaluator = DecodingEvaluator(experts, paths, ["expert_head", "linear", "ridge", "feature_ridge"])
    make_trainer().test(evaluator, datamodule=tasks, verbose=False)
    rows = [outcome.columns for outcome in evaluator.measurements]
    found = {(row["method"], row["decoder"], row["erased"].count("+") + 1): row for row in rows}
    assert {decoder for method, decoder, _ in found if method == "none"} == {"ridge", "feature_ridge"}
    assert {decoder for method, decoder, _ in found if method == "oracle"} == {"linear"}
    costs = {key: (row["forwards"], row["losses"], row["decoder_passes"] / 60) for key, row in found.items()}
    for lost in (1, 2):
        assert costs["average", "expert_head", lost] == (1, 3, 0)
        assert costs["average", "linear", lost] == (2 + 3 - lost, 2, 0)
        assert costs["average", "ridge", lost] == (2 + 3 - lost, 2, 5)
        assert costs["none", "ridge", lost] == (3 - lost, 2, 3)
    kept = sum(Path(path).stat().st_size for path in paths) / 2**20
    memory = {(name, decoder): row["memory_mib"] for (name, decoder, _), row in found.items()}
    assert memory["average", "linear"] == pytest.approx(kept, rel=0.1)  # a file's header is large beside tiny tensors
    assert memory["average", "linear"] < memory["average", "expert_head"]
    assert memory["none", "ridge"] < memory["average", "ridge"] - memory["average", "linear"]
    assert all(math.isnan(row[cost]) for row in rows if row["method"] == "oracle" for cost in ("memory_mib", "losses"))


def test_where_all_kinds_are_taken_odd_heads_are_left_out_in_one_line(parts, make_trainer):
    experts, paths, tasks = parts
    every, named = (DecodingEvaluator(experts, paths, decoders) for decoders in (None, ["expert_head", "linear"]))
    for evaluator in (every, named):
        second = evaluator.networks.networks([1])[1]
        second.register_forward_hook(lambda _, __, logits: logits.softmax(1))
    with pytest.raises(HeadError, match="are not its head 'fc'"):
        make_trainer().test(named, datamodule=tasks, verbose=False)
    with pytest.warns(CoinWarning, match=r"^expert_head is left out: the logits of [^\n]*$"):
        make_trainer().test(every, datamodule=tasks, verbose=False)
    assert {outcome.columns["decoder"] for outcome in every.measurements} == {"linear", "ridge", "feature_ridge"}
