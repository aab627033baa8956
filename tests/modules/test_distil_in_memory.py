import logging
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import coin
from coin.errors import ConfigurationError, NumericalError
from coin.merging import Experts

CODE = coin.Code([[0.4, 0.6]])
FAST = {"lr": 1e-2, "steps": 40, "batch_size": 8}


def distill(experts, code, inputs, **options):
    return coin.merge_networks(coin.Distillation(**options), experts, code, calibration=inputs)


class Plain(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh())
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.body(x))


class Named(Plain):
    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x))


def make(kind=Plain, counts=(3, 3)):
    made = []
    for seed, classes in enumerate(counts):
        torch.manual_seed(seed)
        made.append(kind(classes).train(seed == 0))
    return made


def calibration():
    draw = torch.Generator().manual_seed(5)
    return [list(torch.randn(30, 6, generator=draw).split(8)) for _ in range(2)]


def equal(one, other):
    other = other.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items())


def loss(network, experts):
    inputs = torch.cat([batch for batches in calibration() for batch in batches])
    with torch.no_grad():
        outputs = [deepcopy(expert).eval()(inputs) for expert in experts]
        return float((network(inputs) - 0.4 * outputs[0] - 0.6 * outputs[1]).square().mean())


def test_it_comes_nearer_than_its_start_and_leaves_the_experts_as_found(capfd, caplog, recwarn):
    experts = make()
    before = deepcopy(experts)
    modes = [[module.training for module in expert.modules()] for expert in experts]
    torch.manual_seed(17)
    state, level = torch.get_rng_state(), logging.getLogger("lightning.pytorch").level
    options = {"lr": 1e-2, "steps": 200, "start": "average", "batch_size": 32}
    (coded,) = distill(experts, CODE, calibration(), **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger("lightning.pytorch").level == level
    (start,) = coin.merge_networks(coin.Average(), experts, CODE, calibration=calibration())
    assert loss(coded, experts) < 0.2 * loss(start, experts)
    assert not any(module.training for module in coded.modules())
    assert all(torch.equal(*pair) for pair in zip(coded.buffers(), start.buffers(), strict=True))
    for parameter, before_it in zip(coded.parameters(), start.parameters(), strict=True):
        assert parameter.grad is None
        assert not torch.equal(parameter, before_it)
    assert type(coded) is Plain
    for expert, own, mode in zip(experts, before, modes, strict=True):
        assert [module.training for module in expert.modules()] == mode
        assert equal(expert, own)
        assert all(p.requires_grad and p.grad is None for p in expert.parameters())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not [warning for warning in recwarn if "lightning" in str(warning.filename)]


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_seed_gives_the_same_network_whatever_was_drawn_before_and_in_any_context(context):
    def trained(seed, state):
        torch.manual_seed(state)
        method = coin.Distillation(seed=seed, **{**FAST, "steps": 10})
        return coin.merge_networks(method, make(), CODE, calibration=calibration())[0]

    wanted = trained(None, 1)
    with context():
        found = trained(0, 2)
    assert equal(found, wanted)
    assert not equal(trained(3, 1), wanted)


def test_batches_by_name_and_other_class_counts_train_as_well():
    named = [[{"x": batch} for batch in batches] for batches in calibration()]
    (expected,) = distill(make(counts=(3, 2)), CODE, calibration(), **FAST)
    (found,) = distill(make(Named, (3, 2)), CODE, named, **FAST)
    assert type(found) is Named
    assert vars(found).keys() == vars(Named(3)).keys()
    assert equal(found, expected)


@pytest.mark.parametrize("whole", [False, True])
def test_frozen_parameters_stay_unless_all_are(whole):
    experts = make()
    experts[1].body[0].load_state_dict(experts[0].body[0].state_dict())
    for expert in experts:
        (expert if whole else expert.body[0]).requires_grad_(False)
    (coded,) = distill(experts, CODE, calibration(), **FAST)
    assert torch.equal(coded.body[0].weight, experts[0].body[0].weight) != whole
    assert not coded.body[0].weight.requires_grad
    assert coded.head.weight.requires_grad != whole
    assert not any(p.requires_grad for expert in experts for p in expert.body[0].parameters())


def test_experts_answer_once_to_all_samples_and_once_to_those_of_the_trials_start():
    experts, answered = make(), []
    experts[1].register_forward_pre_hook(lambda _, inputs: answered.append(len(inputs[0])))
    of_all = Experts(experts, calibration=calibration())
    method = coin.Distillation(learning_rates=[1e-3, 1e-2], steps=4, batch_size=64)
    made = method.make(of_all, [0.4, 0.6])
    losses = made.chosen["held_out_loss"]
    assert list(losses) == ["0.001", "0.01"]
    assert made.chosen["lr"] == float(min(losses, key=losses.get))
    counts = [count for count in answered if count > 2]  # two are for checks
    assert sorted(counts) == [10, 12, 38, 48]
    fixed = coin.Distillation(lr=made.chosen["lr"], steps=4, batch_size=64)
    assert equal(made.network, fixed.make(Experts(make(), calibration=calibration()), [0.4, 0.6]).network)


def test_the_code_row_is_as_exact_as_the_experts():
    """0.4 + 0.6 is not 1 in float32, by which identical experts in float64 were trained away from themselves."""
    expert = make()[0].double().eval()
    inputs = [[batch.double() for batch in batches] for batches in calibration()]
    (coded,) = distill([expert, deepcopy(expert)], CODE, inputs, lr=1e-2, steps=2, start="average")
    torch.testing.assert_close(coded(inputs[0][0]), expert(inputs[0][0]), rtol=0, atol=1e-4)


def test_what_memory_does_not_allow_is_told():
    experts = make()
    for options in ({"augmentation": "shift"}, {"samples_per_task": 4}):
        with pytest.raises(ConfigurationError, match="for batches in memory, taken as they are"):
            distill(experts, CODE, calibration(), **FAST, **options)
    distill(experts, CODE, calibration(), lr=1e-2, steps=1, augmentation="none")
    with pytest.raises(ConfigurationError, match="found no calibration inputs, which the merge needs"):
        coin.merge_networks(coin.Distillation(lr=1e-3), experts, CODE)
    with pytest.raises(NumericalError, match="distillation diverged with lr=1e"):
        distill(experts, CODE, calibration(), lr=1e30, steps=5)
