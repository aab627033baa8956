"""Refit against the normal equations of every layer, and what every network and every caller may rely on."""

import re
from copy import deepcopy

import pytest
import torch
from near_experts import (
    NETWORKS,
    PARTLY_FITTED,
    ROW,
    SIZES,
    Apply,
    Scale,
    assert_answers_close,
    assert_same_tensors,
    case_of,
    distance,
    experts_of,
    mean,
    near_experts,
)
from torch import nn
from torch.func import functional_call, jacfwd
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.testing import assert_close

from coin.errors import CoinWarning, ConfigurationError, DataError, StateError
from coin.merging import Experts, Refit
from coin.merging.body import default_memory_mib
from coin.merging.rows import chosen_rows
from coin.merging.units import PROBES, affine_units

RIDGE = 0.03


# The reference: maps fused with their BatchNorms by PyTorch, and the equations that a minimiser fulfils


def average_of(networks):
    average = deepcopy(networks[0])
    states = [network.state_dict() for network in networks]
    for name, tensor in average.state_dict().items():
        tensor.copy_(sum(share * state[name] for share, state in zip(ROW, states, strict=True)))
    return average


def fused(network, units):
    """Return a copy in which a map with its BatchNorm is one map, and the BatchNorm an identity."""
    network = deepcopy(network)
    for name, norm in units.items():
        if norm != name:
            module = network.get_submodule(name)
            fuse = fuse_linear_bn_eval if isinstance(module, nn.Linear) else fuse_conv_bn_eval
            network.set_submodule(name, fuse(module, network.get_submodule(norm)))
            network.set_submodule(norm, nn.Identity())
    return network


def watched(network, name, x):
    """Return the input and the output of one module, and the network's answer."""
    seen = []

    def watch(module, given, output):
        seen.extend([given[0].clone(), output])
        return output.clone()  # which the next layer may write over

    with network.get_submodule(name).register_forward_hook(watch):
        answer = network(x)
    return *seen, answer


def by_channel(module, output):
    """Return a module's outputs at all positions, [n, C]; a number that scales all channels has one."""
    if not isinstance(module, nn.Linear | nn.LayerNorm | Scale):
        output = output.movedim(1, -1)
    channels = len(module.weight) if module.weight.ndim > 0 else 1
    return output.reshape(-1, channels)


def inputs_of_weights(module, given):
    """Return what each weight of every output multiplies, [n, C, K]."""

    def sums(weight):
        output = functional_call(module, {"weight": weight}, given)
        return by_channel(module, output).sum(1)

    derivatives = jacfwd(sums)(module.weight)  # [n, *weight]
    channels = len(module.weight) if module.weight.ndim > 0 else 1
    return derivatives.reshape(len(derivatives), channels, -1)


def position_weights(network, name, tasks):
    """Return what a module's positions in a sample weigh: half alike, half by the gradients of ½‖f − mean f‖²."""
    module = network.get_submodule(name)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return torch.ones(1)
    with torch.enable_grad():
        x = torch.cat(tasks)
        _, output, logits = watched(network, name, x)
        centred = logits - logits.mean(1, keepdim=True)
        (gradient,) = torch.autograd.grad(centred.square().sum() / 2, output)
    squares = by_channel(module, gradient).square().sum(1)
    of_position = squares.view(len(x), -1).mean(0)
    return 0.5 + 0.5 * of_position / of_position.mean()


@torch.no_grad()
def assert_refitted(made, networks, tasks, units, places=None):
    """Every unit fulfils Σ w (W a + b − z) aᵀ + λ (W − W̄) = 0 and Σ w (W a + b − z) = 0 on the coded network's inputs.

    `places` are by name of module the positions of every task's samples that are rows, by default all.
    """
    experts = [fused(network, units) for network in networks]
    start = average_of(experts)
    for name, tensor in start.state_dict().items():
        place, _, part = name.rpartition(".")
        is_fitted = place in units and part in ("weight", "bias")
        assert is_fitted or torch.allclose(made.state_dict()[name], tensor), name
    for name, norm in units.items():
        module = start.get_submodule(name)
        chosen = None if places is None else places[name]
        weights = position_weights(start, name, tasks)
        rows = []
        residuals = []
        shares = []
        for task, x in enumerate(tasks):
            given, _, _ = watched(made, name, x)
            _, found, _ = watched(made, norm, x)
            _, wanted, _ = watched(experts[task], name, x)
            a = inputs_of_weights(module, given)
            r = by_channel(module, found - wanted)
            positions = len(a) // len(x)
            w = weights.expand(len(x), positions).flatten()
            if chosen is not None:
                first = positions * torch.arange(len(x))[:, None]
                index = (first + chosen[task]).flatten()
                a = a[index]
                r = r[index]
                w = torch.ones(len(index))
            rows.append(a)
            residuals.append(r)
            shares.append(ROW[task] * w.double() / len(w))
        a = torch.cat(rows)
        r = torch.cat(residuals)
        w = torch.cat(shares)
        has_bias = getattr(module, "bias", None) is not None
        centred = a - torch.tensordot(w, a, 1) if has_bias else a
        variance = torch.tensordot(w, centred.square(), 1).mean(1)  # [C]
        weight = made.get_parameter(f"{name}.weight")
        step = (weight - module.weight).reshape(len(variance), -1)
        pull = torch.einsum("n,nc,nck->ck", w, r, a)
        ridge = RIDGE * variance[:, None] * step
        assert_close(pull, -ridge, rtol=0, atol=1e-9 * float(ridge.abs().max() + 1))
        if has_bias:
            assert_close(w @ r, torch.zeros_like(r[0]), rtol=0, atol=1e-9)


def units_of(kind):
    """Return by the names of a network's units, a map or a norm, the norm that is folded in, or their own."""
    units = {}
    for each in NETWORKS[kind].names:
        name, _, norm = each.partition("+")
        units[name] = norm or name
    return units


def refit(networks, tasks, **options):
    return Refit(RIDGE, **options).coded_model(experts_of(networks, tasks), ROW)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.filterwarnings("ignore:method 'refit' leaves")
def test_it_is_the_regression_of_every_layer_in_turn(kind):
    networks, tasks = case_of(kind)
    made = refit(networks, tasks, head=False)
    assert_refitted(made.network, networks, tasks, units_of(kind))
    averaged = ["3.place"] if kind == "layer scale" else []
    assert made.chosen == {"ridge": RIDGE, "averaged": averaged}


@pytest.mark.parametrize("kind", ["convolutions", "layer norm"])
def test_of_many_samples_some_positions_are_rows_that_weigh_alike(kind):
    networks, tasks = case_of(kind, sizes=(150, 250, 200))
    experts = experts_of(networks, tasks)
    made = Refit(RIDGE, head=False).coded_model(experts, ROW)
    body = made.start
    inputs = experts.pooled.inputs()
    rows = chosen_rows(body.network, body.trace.units, inputs, experts.tasks, ROW, 2**40)
    places = {}
    for weight, chosen in rows.places.items():
        of_task = None
        if chosen is not None:
            of_task = [chosen[experts.tasks == task] for task in range(3)]
        places[weight.removesuffix(".weight")] = of_task
    assert any(places.values())
    assert_refitted(made.network, networks, tasks, units_of(kind), places)


@pytest.mark.parametrize("kind", PARTLY_FITTED)
@pytest.mark.filterwarnings("ignore:method 'refit' leaves")
def test_only_what_is_no_affine_map_that_runs_once_keeps_the_average(kind):
    networks, tasks = case_of(kind)
    made = refit(networks, tasks, head=False)
    averaged = PARTLY_FITTED[kind].names
    assert made.chosen["averaged"] == averaged
    average = average_of(networks).state_dict()
    for name, parameter in made.network.named_parameters():
        is_average = torch.allclose(parameter, average[name], rtol=0, atol=1e-12)
        assert is_average == (name in averaged), name


def test_an_expert_that_has_no_share_of_the_row_is_not_run():
    networks, tasks = case_of("convolutions")
    experts = experts_of(networks, tasks)
    networks[1].forward = None
    made = Refit(RIDGE, head=False).coded_model(experts, (0.4, 0.0, 0.6))
    without = experts_of(networks[::2], tasks[::2])
    other = Refit(RIDGE, head=False).coded_model(without, (0.4, 0.6))
    assert_answers_close(made.network, other.network, tasks, 1e-9)


def test_bfloat16_is_fitted_in_float32():
    """Regressions in bfloat16 itself, of 8 bits, were far off."""
    networks, tasks = case_of("layer norm")
    made = refit(networks, tasks).network
    found = refit([deepcopy(network).bfloat16() for network in networks], tasks).network
    assert found[0].weight.dtype == torch.bfloat16
    assert distance(found.double(), made, torch.cat(tasks)) < 0.05


# Passes and memory


@pytest.mark.parametrize(
    ("kind", "head"), [("convolutions", True), ("convolutions", False), ("vit", False)]
)
def test_every_network_runs_once_and_passes_are_counted(kind, head):
    networks, tasks = case_of(kind)
    experts = experts_of(networks, tasks)
    Refit(RIDGE, head=head).coded_model(experts, ROW)
    samples = sum(SIZES)
    of_head = 4 * samples if head else 0  # the experts and the coded model
    of_positions = 3 * samples if kind == "vit" else 0  # a forward and a backward pass
    assert experts.passes == PROBES + 2 * samples + of_head + of_positions


def test_samples_that_do_not_fit_the_memory_are_left_out_with_a_warning():
    networks, tasks = case_of("convolutions", sizes=(800, 900, 700))
    experts = experts_of(networks, tasks)
    message = r"method 'refit' fits its layers on (\d+) of 2400 calibration samples, which need memory_mib=(\d+)"
    with pytest.warns(CoinWarning, match=message) as warned:
        Refit(RIDGE, head=False, memory_mib=2).coded_model(experts, ROW)
    samples, needed = map(int, re.search(message, str(warned[0].message)).groups())
    assert experts.passes == PROBES + 2 * samples
    assert 2 / needed == pytest.approx(samples / 2400, rel=0.2)


def test_experts_run_once_for_every_layer_where_their_outputs_do_not_fit():
    """Two layers whose outputs for 100 samples take 38 MiB each; at least 64 MiB of outputs are held."""
    width = 100_000
    pool = Apply(lambda x: x.view(len(x), 10, -1).mean(2))
    network = nn.Sequential(Scale(width), Scale(width), pool, nn.Linear(10, 3))
    networks = [network, deepcopy(network)]
    networks[1][0].weight.data.uniform_()
    calibration = [[torch.randn(50, width)] for _ in networks]
    made = []
    for memory_mib, groups in ((8192, 1), (200, 2)):
        experts = Experts(networks, calibration=calibration)
        method = Refit(head=False, memory_mib=memory_mib)
        made.append(method.coded_model(experts, (0.5, 0.5)).network)
        assert experts.passes == PROBES + (groups + 1) * 100
    assert_same_tensors(*made)


def test_the_bound_on_activations_is_a_share_of_what_is_free_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 << 30, 8 << 30))
    assert default_memory_mib(torch.device("cuda", 0)) == 3 << 10
    assert default_memory_mib(torch.device("cpu")) == 8192


# What is refused


class Forks(nn.Module):
    """Calls its layers in one of several ways, or by the size of the batch."""

    def __init__(self):
        super().__init__()
        self.way = "straight"
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        if self.way == "turned":
            return self.head(self.first(self.second(x)))
        if self.way == "again":
            x = self.first(x)
        x = self.first(x)
        is_short = self.way == "short" or (self.way == "by size" and len(x) > 2)
        return self.head(x if is_short else self.second(x))


class Chunks(nn.Module):
    """A network that runs a batch in chunks of three."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return torch.cat([self.head(self.map(chunk).tanh()) for chunk in x.split(3)])


def mixing():
    """Identical experts were 3 to 15 % off."""
    centre = Apply(lambda x: x - x.mean(0) / 2)
    return nn.Sequential(nn.Linear(6, 5), centre, nn.Linear(5, 3))


OTHER_CALLS = r"^an expert calls other layers than [^\n]*$"
# A network, the expert that has an attribute, and the line.
REFUSED = {
    "fewer calls": (Forks, 1, {"way": "short"}, StateError, OTHER_CALLS),
    "another order": (Forks, 1, {"way": "turned"}, StateError, OTHER_CALLS),
    "more calls": (Forks, 1, {"way": "again"}, StateError, OTHER_CALLS),
    "calls by the number of samples": (
        Forks,
        0,
        {"way": "by size"},
        StateError,
        "Forks makes other calls on two samples than on three",
    ),
    "chunks": (
        Chunks,
        0,
        {},
        StateError,
        r"'map\.weight' is called on \d+ rows for \d+ samples.*not in chunks",
    ),
    "mixed samples": (
        mixing,
        0,
        {},
        StateError,
        "gives a sample other outputs beside others than alone",
    ),
    "checkpointing": (
        Forks,
        0,
        {"grad_checkpointing": True},
        ConfigurationError,
        r"call set_grad_checkpointing\(False\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_networks_that_cannot_be_refitted_are_refused(name):
    make, place, attributes, error, message = REFUSED[name]
    networks, tasks = near_experts(make, (6,))
    vars(networks[place]).update(attributes)
    with pytest.raises(error, match=message):
        refit(networks, tasks)


@pytest.mark.parametrize("row", [(1.0, 0.0, 0.0), ROW])
def test_a_task_with_a_share_and_no_samples_is_refused(row):
    networks, tasks = case_of("two layers")
    experts = experts_of(networks, [tasks[0][:0], *tasks[1:]])
    message = r"found no calibration samples of task 0, .* share in .* raise memory_mib"
    with pytest.raises(DataError, match=message):
        Refit(head=False).coded_model(experts, row)


# Rows that are not where they seem to be


def set_to_zero(x):
    y = x.clone()
    y[x < 0] = 0
    return y


def product(x):
    chosen = torch.eye(4).expand(len(x), 4, 4).ge(x.mean((1, 2), keepdim=True))
    return chosen.type_as(x) @ x


IN_PLACE = {
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked fill": lambda x: x.masked_fill(x.lt(0), 0),
    "set": set_to_zero,
    "rounded": lambda x: x + (x.round() - x).detach(),
    "masked attention": lambda x: F.scaled_dot_product_attention(x, x, x, (x @ x.mT) > -9),
}
PLACED = {
    "index": lambda x: x[(x > -9).all(2)].view(x.shape),
    "gathered": lambda x: x.gather(1, (0 * x).long()),
    "product": product,
    "sorted": lambda x: x.sort(1).values,
    "by time": lambda x: x.transpose(0, 1),
}


@pytest.mark.parametrize("name", [*IN_PLACE, *PLACED])
def test_rows_that_are_not_of_the_sample_that_they_are_taken_for_are_left_alone(name):
    """It took row r for sample r // k and looked at shapes alone."""
    between = (IN_PLACE | PLACED)[name]
    last = Apply(lambda x: x.transpose(0, 1) if name == "by time" else x)
    layers = (
        nn.Linear(4, 6),
        Apply(between),
        nn.Linear(6, 6),
        nn.Tanh(),
        last,
        mean(),
    )
    network = nn.Sequential(*layers, nn.Linear(6, 3))
    units = [unit.weight for unit in affine_units(network, torch.randn(3, 4, 4)).units]
    behind = ["2.weight"] if name in IN_PLACE else []
    assert units == ["0.weight", *behind, "6.weight"]


class Ordered(nn.Module):
    """Runs its samples in the order of their lengths, as with packed sequences, and puts them back."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        order = x[:, 0].argsort(stable=True)  # by a length, which is of the inputs alone
        rows = self.first(x[order]).tanh()
        return self.head(rows[order.argsort()])


@pytest.mark.filterwarnings("ignore:method 'refit' leaves")
def test_rows_that_inputs_place_are_not_fitted_though_the_first_samples_lie_in_order():
    networks, tasks = near_experts(Ordered, (5,), sizes=(10, 10, 10))
    for task in tasks:
        task[:, 0] = torch.randint(1, 9, (10,))
        task[:4, 0] = 1  # as long as one another
    assert refit(networks, tasks).chosen["averaged"] == ["first.bias", "first.weight"]


class Unbatched(torch.autograd.Function):
    """The identity, whose backward pass goes through NumPy and so takes no batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.detach().numpy().copy())


def test_networks_whose_backward_pass_cannot_be_batched_are_fitted():
    layers = (
        nn.Linear(4, 6),
        Apply(Unbatched.apply),
        nn.Linear(6, 3),
    )
    networks, tasks = near_experts(lambda: nn.Sequential(*layers), (4,))
    assert refit(networks, tasks).chosen["averaged"] == []


# The caller


def breaks(*_):
    raise RuntimeError("broken off")


def test_where_an_expert_breaks_off_the_caller_finds_everything_as_it_was():
    networks, tasks = case_of("linear norm")
    expert = networks[1].train()
    expert[1].eval()
    before = deepcopy(expert)
    expert[3].register_forward_pre_hook(breaks)
    with pytest.raises(RuntimeError, match=r"^broken off$"):
        refit(networks, tasks)
    assert torch.is_grad_enabled()
    assert [each.training for each in expert.modules()] == [True, True, False, True, True]
    assert_same_tensors(expert, before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_inside_a_callers_context(context):
    networks, tasks = case_of("convolutions")
    wanted = refit(networks, tasks).network
    with context():
        own = [task.clone() for task in tasks]
        found = refit(deepcopy(networks), own).network
    assert_answers_close(found, wanted, tasks, 1e-12)
    found(tasks[0]).sum().backward()  # an ordinary network that can be trained on
