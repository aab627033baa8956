"""What is chosen on held-out samples, by which error; what distillation may start from; how far experts are apart."""

import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import coin
from coin.coding import Answers, DecoderKind
from coin.errors import CoinWarning, ConfigurationError, DataError, HeadError, NumericalError
from coin.merging import Average, Coin, Experts, Refit, RegMean
from coin.merging.closed_form import held_out_error
from coin.merging.expert_sources import FAR, spread
from coin.networks import recalibrate
from coin.networks.calling import clone
from coin.networks.running import features_and_logits
from coin.pipeline.options import config_dict
from coin.statistics import FisherKind, fisher_diagonal
from coin.statistics.statistic import DataChoice

ROW = (0.4, 0.35, 0.25)
PAIR = (0.9, 0.1)
CODE = coin.Code([ROW])
SETTINGS = (FisherKind.exact, DataChoice.own)
BN_SAMPLES, BN_HELD_OUT = 80, 16  # of both tasks


def same(first, second):
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


# The error


def network():
    layers = [nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 3)).double().eval()


def setup(tail=None, samples=40):
    """An initialisation, three experts near it that differ in their statistics too, and their samples."""
    torch.manual_seed(0)
    initial, draw = network(), torch.Generator().manual_seed(1)
    networks = [clone(initial) for _ in ROW]
    for each in networks:
        for tensor in (*each.parameters(), each[1].running_mean, each[1].running_var):
            tensor.data += 0.2 * torch.rand(tensor.shape, generator=draw, dtype=torch.float64)
    if tail is not None:
        networks = [nn.Sequential(*each, tail) for each in networks]
    calibration = [[torch.randn(samples, 2, 4, 4, generator=draw, dtype=torch.float64)] for _ in ROW]
    return networks, {"initial": initial, "calibration": calibration}


def of(*names):
    return [DecoderKind(name) for name in names]


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


def test_one_sample_a_task_is_judged_by_the_linear_decoder():
    networks, given = setup(samples=1)
    experts = Experts(networks, **given)
    assert held_out_error(experts, networks[0], ROW, of("feature_ridge")) == held_out_error(experts, networks[0], ROW)


def test_where_logits_are_no_heads_of_the_features_the_own_head_does_not_judge():
    networks, given = setup(tail=nn.Tanh())
    experts = Experts(networks, **given)
    both = held_out_error(experts, networks[0], ROW, of("linear", "expert_head"))
    assert both == held_out_error(experts, networks[0], ROW)
    with pytest.raises(HeadError, match=r"are not its head '6' .*of its input"):
        held_out_error(experts, networks[0], ROW, of("expert_head"))


def test_without_held_out_leaves_every_tasks_last_samples_out():
    experts = Experts([nn.Linear(4, 3)] * 2, calibration=[torch.randn(60, 4).split(20) for _ in range(2)])
    fitted = Experts(experts.networks, calibration=experts.fitted(DataChoice.own))
    assert [sum(map(len, each)) for each in fitted.samples("own")] == [48, 48]
    assert torch.equal(torch.cat(list(fitted.pooled)), torch.cat(list(experts.split[0])))


def test_the_first_of_the_best_is_chosen_one_alone_untried_and_none_that_is_not_finite():
    networks, calibration = batchnorm_networks("average")
    experts, broken = Experts(networks, calibration=calibration), deepcopy(networks[0])
    broken[-1].bias.data[0] = torch.nan

    def made(*options):
        class Given(coin.MergeMethod):
            name = label = "mine"

            def candidates(self, experts, row):
                for place, network in enumerate(options):
                    yield {"its_data": place}, dict(network.named_parameters())

        return Given(batchnorm="average").make(experts, (0.0, 1.0)).chosen

    found = made(broken, networks[1], networks[0], networks[1])
    errors = list(found["held_out_error"].values())
    assert found["its_data"] == 1
    assert errors[0] == float("inf")
    assert errors[1] == errors[3] <= errors[2] < 1
    assert "held_out_error" not in made(networks[1])
    with pytest.raises(
        NumericalError, match="the outputs of method 'mine-average' on held-out calibration samples are not"
    ):
        made(broken, broken)


# BatchNorm


def batchnorm_networks(better):
    """Two experts of one function whose average is right with the average of their statistics, or with new ones."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 2), nn.BatchNorm2d(6), nn.ReLU()]
    first = nn.Sequential(*body, nn.AvgPool2d(3), nn.Flatten(), nn.Linear(6, 3)).double()
    calibration = [(3 + 4 * torch.randn(40, 2, 6, 6, generator=draw, dtype=torch.float64)).split(8) for _ in range(2)]
    second = deepcopy(first)
    if better == "recalibrate":
        # Trained along: the second's convolutions are 50 times larger, which its statistics take back. The average of
        # the variances is not the variance of the average.
        for layer in (second[0], second[3]):
            layer.weight.data.mul_(50)
            layer.bias.data.mul_(50)
        for network in (first, second):
            recalibrate(network, coin.Experts([network] * 2, calibration=calibration).pooled)
    else:
        # Frozen: they were another data set's, and the later layers have learnt to live with them.
        for layer in (second[1], second[4]):
            layer.running_mean.add_(0.01)
    return [first.eval(), second.eval()], calibration


@pytest.mark.parametrize("better", ["average", "recalibrate"])
def test_auto_takes_the_batchnorm_policy_with_the_smaller_held_out_error(better):
    networks, calibration = batchnorm_networks(better)
    experts = Experts(networks, calibration=calibration)
    made = Average().make(experts, PAIR)
    other, fixed, found = Experts(networks, calibration=calibration), {}, {}
    for policy in ("average", "recalibrate"):
        fixed[policy] = Average(batchnorm=policy).make(other, PAIR).network
        trial = deepcopy(fixed[policy])
        if policy == "recalibrate":  # what is judged has not seen the samples that judge it
            recalibrate(trial, other.split[0])
        found[policy] = held_out_error(other, trial, PAIR)
    (worse,) = {"average", "recalibrate"} - {better}
    assert found[better] < 0.1 < 0.3 < found[worse]
    assert made.chosen == {"batchnorm": better, "held_out_error": pytest.approx(found, rel=1e-10)}
    assert same(made.network, fixed[better])
    assert not same(made.network, fixed[worse])
    # The experts and both candidates on the held-out samples; the statistics on the others, and at last on all.
    passes = 4 * BN_HELD_OUT + (BN_SAMPLES - BN_HELD_OUT) + (BN_SAMPLES if better == "recalibrate" else 0)
    assert experts.passes == passes
    Average().make(experts, (0.5, 0.5))
    assert experts.passes - passes == passes - 2 * BN_HELD_OUT  # the experts are run once for all rows


def test_statistics_that_all_experts_share_stay_to_the_last_bit():
    networks, calibration = batchnorm_networks("average")
    networks.append(deepcopy(networks[0]))
    shared = {name: 0.1 + torch.rand_like(each) for name, each in networks[0].named_buffers() if each.ndim}
    for network in networks:
        for name, tensor in shared.items():
            network.get_buffer(name).copy_(tensor)
    experts = Experts(networks, calibration=[*calibration, calibration[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = Average().make(experts, (0.1, 0.2, 0.7))
    assert made.chosen == {"batchnorm": "same"}
    assert experts.passes == 0
    for name, tensor in shared.items():
        assert torch.equal(made.network.get_buffer(name), tensor), name


def test_without_calibration_data_auto_averages_with_a_warning():
    networks, _ = batchnorm_networks("recalibrate")
    with pytest.warns(CoinWarning, match=r"^found no calibration inputs, needed by method 'soup' [^\n]*average"):
        made = Average(label="soup").make(Experts(networks), PAIR)
    assert made.chosen == {"batchnorm": "average"}
    assert same(made.network, Average(batchnorm="average").make(Experts(networks), PAIR).network)


def test_candidates_and_policies_are_chosen_together_for_the_decoders_in_use(monkeypatch):
    networks, calibration = batchnorm_networks("recalibrate")
    made = Coin().make(Experts(networks, calibration=calibration), PAIR)
    residuals = made.chosen["held_out_error"]
    assert set(residuals) == {f"{data}/{policy}" for data in ("own", "pooled") for policy in ("average", "recalibrate")}
    assert "/".join(made.chosen[name] for name in ("fisher_data", "batchnorm")) == min(residuals, key=residuals.get)
    asked, decoders, errors = [], ["expert_head", "ridge"], iter((0.4, 0.3, 0.1, 0.2))
    told = "coin.merging.closed_form.held_out_error"
    monkeypatch.setattr(told, lambda *given: asked.append([each.name for each in given[3]]) or next(errors))
    (chosen,) = coin.merge_networks(Coin(), networks, [PAIR], calibration=calibration, decoders=decoders).chosen
    assert asked == [decoders] * 4
    assert (chosen["fisher_data"], chosen["batchnorm"]) == ("pooled", "average")


# The data of statistics


def linear_networks():
    """Two linear experts whose tasks' inputs have little in common."""
    torch.manual_seed(0)
    networks = [nn.Linear(6, 4).double() for _ in range(2)]
    draw = torch.Generator().manual_seed(1)
    scales = torch.tensor([[3, 3, 3, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 3, 3, 3]], dtype=torch.float64)
    return networks, [(scale * torch.randn(20, 6, generator=draw, dtype=torch.float64)).split(8) for scale in scales]


@pytest.mark.parametrize(
    ("method", "option"), [(Coin(damping=0), "fisher_data"), (RegMean(alpha=1, damping=0), "gram_data")]
)
def test_pooled_statistics_of_a_linear_layer_are_exact_and_auto_takes_them(method, option):
    networks, calibration = linear_networks()
    inputs, row, made, errors = torch.cat([batch for task in calibration for batch in task]), (0.5, 0.5), {}, {}
    with torch.no_grad():
        target = sum(weight * network(inputs) for weight, network in zip(row, networks, strict=True))
    for data in ("own", "pooled", "auto"):
        setattr(method, option, type(method)(**{option: data}).__dict__[option])
        made[data] = method.make(Experts(networks, calibration=calibration), row)
        assert made[data].chosen[option] == ("pooled" if data == "auto" else data)
        with torch.no_grad():
            errors[data] = float((made[data].network(inputs) - target).norm() / target.norm())
    assert errors["pooled"] < 1e-10
    assert errors["own"] > 0.1
    assert same(made["auto"].network, made["pooled"].network)
    residuals = made["auto"].chosen["held_out_error"]
    assert residuals["pooled"] < 1e-10 < 0.01 < residuals["own"]


def test_one_statistic_that_is_given_is_taken_without_a_look():
    networks, calibration = linear_networks()
    fishers = [fisher_diagonal(*pair) for pair in zip(networks, calibration, strict=True)]
    for option, data in ((None, "own"), ("pooled", "pooled")):
        made = Coin(fisher_data=option).make(Experts(networks, fishers=fishers), (0.5, 0.5))
        assert made.chosen == {"fisher_data": data}
    many = type("Many", (coin.MergeMethod,), {"name": "many", "candidates": lambda self, *_: [({}, {})] * 2})
    with pytest.raises(ConfigurationError, match="no calibration inputs, by which method 'many' chooses"):
        many().make(Experts(networks, fishers=fishers), (0.5, 0.5))


def test_samples_of_unlike_shapes_merge_and_what_is_no_input_is_told():
    networks = [nn.Sequential(nn.EmbeddingBag(9, 6), nn.Linear(6, 3)) for _ in range(2)]
    draw = torch.Generator().manual_seed(0)
    ragged = [[torch.randint(9, (10, length), generator=draw) for length in (4, 7)] for _ in range(2)]
    experts = Experts(networks, calibration=ragged)
    assert [tuple(batch.shape) for batch in experts.pooled] == [(10, 4), (10, 4), (10, 7), (10, 7)]
    assert experts.tasks.tolist() == [0, 1] * 20
    assert Average().make(experts, PAIR).network(ragged[0][1]).shape == (10, 3)
    labelled = [[(batch, torch.zeros(10)) for batch in batches] for batches in ragged]
    for given, expected in zip(Experts(networks, calibration=labelled).pooled, experts.pooled, strict=True):
        assert torch.equal(given, expected)
    assert set(Experts([*networks, networks[0]], calibration=[*ragged, []]).tasks.tolist()) == {0, 1}
    with pytest.raises(DataError, match="found no calibration batches, expected at least one"):
        Experts(networks, calibration=[[], []])
    with pytest.raises(DataError, match=r"found a tensor for a task's calibration, expected its batches; write \[ten"):
        Experts(networks, calibration=[ragged[0][0], ragged[1][0]])


# Starts


@pytest.mark.parametrize("start", ["refined", "ties", "distillation", "user_method", 3, {"class_path": "Refit"}])
def test_a_start_is_a_closed_form_by_its_name(start):
    with pytest.raises(ConfigurationError, match=r"^found start=.*, expected one of auto, average, head_fit, coin, re"):
        coin.Distillation(start=start)


def test_the_spread_is_the_median_of_the_matrices_whatever_the_head():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    networks = [deepcopy(base) for _ in range(3)]
    for sign, network in zip((1, 0, -1), networks, strict=True):
        for layer, share in zip((0, 2, 4), (1, 1, 1000), strict=True):
            network[layer].weight.data *= 1 + sign * share * FAR
    found = [dict(network.named_parameters()) for network in networks]
    assert spread(found, (0.5, 0.0, 0.5)) == pytest.approx(FAR)


@pytest.mark.filterwarnings("error")
def test_experts_that_agree_or_have_no_matrix_are_not_apart():
    state = {"weight": torch.randn(3, 2, requires_grad=True), "bias": torch.randn(3)}
    torch.set_warn_always(True)  # of parameters that are trained
    try:
        assert spread([state, state], (0.3, 0.7)) == pytest.approx(0, abs=1e-12)
    finally:
        torch.set_warn_always(False)
    assert spread([{"bias": torch.ones(3)}, {"bias": torch.zeros(3)}], (0.5, 0.5)) == 0
    assert spread([{"weight": torch.zeros(3, 2)}] * 2, (0.5, 0.5)) == 0


def test_decoders_are_told_of_only_where_they_decide():
    def said(method, *names):
        return config_dict(method.with_defaults(*SETTINGS, of(*names)))

    one, two = ["linear"], ["linear", "expert_head"]
    for method in (Refit(), Refit("both"), coin.HeadFit(decoders=one), coin.Distillation()):
        assert said(method, *one) == said(method, *two)
    for method in (Average(), Coin(), RegMean()):
        assert said(method, *one) != said(method, *two)
    assert said(Average(decoders=two), *one) == said(Average(), *two)
    with pytest.raises(ConfigurationError, match="decoder='lineal'"):
        Average(decoders=["lineal"])
