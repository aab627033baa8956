"""What Refit starts from, and that it chooses for the decoders that are asked for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import coin
from coin.coding import Answers, DecoderConfig
from coin.errors import ConfigurationError, HeadError
from coin.merging import Experts, Refit
from coin.merging.closed_form import held_out_error
from coin.merging.method import starting_method
from coin.networks.heads import features_and_logits
from coin.pipeline.options import config_dict
from coin.statistics import FisherKind
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind

ROW = (0.4, 0.35, 0.25)
CODE = coin.Code([ROW])
SETTINGS = (FisherKind.exact, DataChoice.own)


def network():
    layers = [nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 3)).double().eval()


def setup(tail=None, samples=40):
    """An initialisation, three experts near it that differ in their statistics too, and their samples."""
    torch.manual_seed(0)
    initial, draw = network(), torch.Generator().manual_seed(1)
    networks = [coin.core.batches.clone(initial) for _ in ROW]
    for each in networks:
        for tensor in (*each.parameters(), each[1].running_mean, each[1].running_var):
            tensor.data += 0.2 * torch.rand(tensor.shape, generator=draw, dtype=torch.float64)
    if tail is not None:
        networks = [nn.Sequential(*each, tail) for each in networks]
    calibration = [[torch.randn(samples, 2, 4, 4, generator=draw, dtype=torch.float64)] for _ in ROW]
    return networks, {"initial": initial, "calibration": calibration}


def of(*names):
    return [DecoderConfig.named(name) for name in names]


# Starts


@pytest.mark.parametrize(
    "start", ["coin", "wudi", "base", {"class_path": "Coin", "init_args": {"batchnorm": "recalibrate"}}], ids=str
)
def test_it_starts_from_the_coded_model_of_another_method_with_its_statistics_folded_in(start, monkeypatch):
    networks, given = setup()
    made = starting_method(start, reads_initial=True).make(Experts(networks, **given), ROW)
    experts = Experts(networks, **given)
    with monkeypatch.context() as patched:
        patched.setattr("coin.merging.passes.fit_unit", lambda *_: None)
        begun = Refit("own", start=start, head=False).make(experts, ROW)
    torch.testing.assert_close(
        experts.run(begun.network, experts.pooled).logits,
        experts.run(made.network, experts.pooled).logits,
        rtol=1e-10,
        atol=1e-10,
    )
    assert torch.equal(begun.network[1].weight, torch.ones(5, dtype=torch.float64))
    assert begun.chosen["start_batchnorm"] == made.chosen["batchnorm"]
    one, two = (Refit("own", start=each).make(Experts(networks, **given), ROW).network for each in (start, "average"))
    assert (one[4].weight - two[4].weight).norm() > 1e-3 * two[4].weight.norm()


def test_what_a_start_wants_and_costs_is_the_refits():
    networks, given = setup()
    method = Refit("own", start="coin").with_defaults(*SETTINGS, of("linear"))
    assert method.statistics() == (Statistic(StatisticKind.fisher, DataChoice.own, FisherKind.exact),)
    assert [Refit(start=each).reads_initial for each in ("average", "coin", "wudi")] == [False, False, True]
    passes = []
    for each in (coin.Coin().with_defaults(*SETTINGS), Refit("own"), method):
        experts = Experts(networks, **given)
        each.make(experts, ROW)
        passes.append(experts.passes)
    outputs = 3 * 3 * 40  # the experts', which the start's choice of a BatchNorm policy and the head both read
    assert passes[2] == passes[0] + passes[1] - outputs * 0.2
    with pytest.raises(ConfigurationError, match="found start='distillation', expected one of"):
        Refit(start="distillation")
    with pytest.raises(ConfigurationError, match="which needs the shared initialisation; choose other options"):
        coin.Distillation(start={"class_path": "Refit", "init_args": {"start": "wudi"}})


# Choices


def cosines(decoded, truth):
    centred = [each - each.mean(1, keepdim=True) for each in (decoded, truth)]
    return float((1 - F.cosine_similarity(*centred)).mean())


def by_hand(experts, coded, names):
    """Every decoder's held-out error, from answers put together here."""
    parts = []
    for batches in experts.split:
        x = torch.cat(list(batches))
        with torch.no_grad():
            *own, last = (features_and_logits(each, x) for each in (*experts.networks, coded))
        parts.append(Answers(torch.stack([y for _, y in own]), last[1][None], [f for f, _ in own], [last[0]]))
    fitted, held_out = parts
    tasks = experts.tasks[fitted.num_samples :]
    errors = {}
    for name in names:
        found = []
        for task in range(3):
            heads = [(each[6].weight, each[6].bias) for each in experts.networks]
            decoder = coin.make_decoder(name, CODE, [task], heads)
            if name != "linear" and name != "expert_head":
                decoder.fit(fitted)
            mine = held_out.select(tasks == task)
            found.append(cosines(decoder.decode(mine)[0].detach(), mine.experts[task]))
        errors[name] = sum(found) / 3
    return errors


NAMES = ["linear", "ridge", "feature_ridge", "expert_head"]
ALONE = {"kind": "feature_ridge", "survivors": False}


def test_the_error_is_the_mean_over_the_decoders_and_the_experts_run_once():
    networks, given = setup()
    experts = Experts(networks, **given)
    coded = [Refit(each).make(Experts(networks, **given), ROW).network for each in ("own", "both")]
    wanted = [by_hand(experts, each, NAMES) for each in coded]
    for name in NAMES:
        for each, expected in zip(coded, wanted, strict=True):
            assert held_out_error(experts, each, ROW, of(name)) == pytest.approx(expected[name], rel=1e-9), name
    fresh = Experts(networks, **given)
    for each, expected in zip(coded, wanted, strict=True):
        mean = sum(expected.values()) / len(NAMES)
        assert held_out_error(fresh, each, ROW, of(*NAMES)) == pytest.approx(mean, rel=1e-9)
    assert fresh.passes == (3 + 2) * 120 + 3 * 8  # experts, both coded models; a look at the experts' heads
    alone = held_out_error(fresh, coded[0], ROW, [DecoderConfig.of(ALONE)])
    assert alone not in (pytest.approx(wanted[0]["feature_ridge"]), pytest.approx(wanted[0]["linear"]))


def test_one_sample_a_task_is_judged_by_the_linear_decoder():
    networks, given = setup(samples=1)
    experts = Experts(networks, **given)
    error = held_out_error(experts, networks[0], ROW, of("feature_ridge"))
    assert error == held_out_error(experts, networks[0], ROW)


@pytest.mark.parametrize("decoders", [["linear"], ["expert_head", "linear"], ["feature_ridge"]])
def test_auto_takes_the_target_with_the_smaller_error_of_these_decoders(decoders, monkeypatch):
    monkeypatch.setattr("coin.merging.refit.FAR", float("inf"))
    networks, given = setup()
    asked = []

    def error(experts, coded, row, chosen):
        asked.append([each.name for each in chosen])
        return float(len(asked) == 1)  # the second is better

    monkeypatch.setattr("coin.merging.closed_form.held_out_error", error)
    (coded,) = (made := coin.merge_networks(Refit(), networks, CODE, decoders=decoders, **given))
    assert isinstance(coded, nn.Module)
    assert asked == [decoders] * 2
    assert made.chosen[0]["target"] == "both"


@pytest.mark.parametrize(("both", "taken"), [(0.86, "own"), (0.84, "both")])
def test_auto_takes_both_only_where_it_is_clearly_ahead(both, taken, monkeypatch):
    """By a hair's breadth it took both on letters that it had never seen, and lost two points by it."""
    monkeypatch.setattr("coin.merging.refit.FAR", float("inf"))
    errors = iter([1.0, both])
    monkeypatch.setattr("coin.merging.closed_form.held_out_error", lambda *_: next(errors))
    networks, given = setup()
    made = coin.merge_networks(Refit(), networks, CODE, **given)
    assert made.chosen[0]["target"] == taken
    assert made.chosen[0]["held_out_error"] == {"own/0.1": 1.0, "both/0.1": both}


def test_for_the_own_head_alone_it_is_own_untried():
    networks, given = setup()
    made = coin.merge_networks(Refit(), networks, CODE, decoders=["expert_head"], **given)
    own = coin.merge_networks(Refit("own"), networks, CODE, **given)
    assert (made.chosen, made.passes) == (own.chosen, own.passes)
    assert all(torch.equal(tensor, own[0].state_dict()[name]) for name, tensor in made[0].state_dict().items())


def test_decoders_are_told_of_only_where_they_decide():
    def said(method, *names):
        return config_dict(method.with_defaults(*SETTINGS, of(*names)))

    one, two = ["linear"], ["linear", "expert_head"]
    for method in (Refit("own"), Refit("both", start="coin"), coin.Average(), coin.Coin(), coin.RegMean()):
        assert said(method, *one) == said(method, *two)
    for method in (Refit(), Refit("own", ridge=None)):
        assert said(method, *one) != said(method, *two)
    assert said(Refit(), "expert_head") == said(Refit("own"), "expert_head")
    assert said(Refit(decoders=two), *one) == said(Refit(), *two)
    assert Refit().with_defaults(*SETTINGS).decoders is None
    with pytest.raises(ConfigurationError, match="decoder='lineal'"):
        Refit(decoders=["lineal"])


def test_where_logits_are_no_heads_of_the_features_the_own_head_does_not_judge():
    networks, given = setup(tail=nn.Tanh())
    experts = Experts(networks, **given)
    both = held_out_error(experts, networks[0], ROW, of("linear", "expert_head"))
    assert both == held_out_error(experts, networks[0], ROW)
    with pytest.raises(HeadError, match=r"are not its head '6' .*of the head's input"):
        held_out_error(experts, networks[0], ROW, of("expert_head"))
