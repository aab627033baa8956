"""Refit against regressions written out layer by layer, and what every network and every caller may rely on."""

import math
import re
import warnings
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import coin
from coin.errors import CoinWarning, DataError, NumericalError, StateError
from coin.merging import Average, Experts, Refit
from coin.merging.average import average_parameters
from coin.merging.rows import LEAST, PROBED, chosen_places, position_weights
from coin.merging.units import PROBES, Unit, affine_units
from coin.networks.small import SmallViT
from coin.statistics.solvers import fit_affine

ROW = (0.2, 0.3, 0.5)
SIZES = (9, 14, 11)
RIDGE = 0.03


class Scale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(*shape))

    def forward(self, x):
        return x * self.gamma


class Shift(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(*shape))

    def forward(self, x):
        return x + self.place


class Attention(nn.MultiheadAttention):
    def __init__(self, width, heads):
        super().__init__(width, heads, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def mean():
    return Apply(lambda x: x.mean(1))


def transposed():
    return Apply(lambda x: x.transpose(1, 2))


class Parallel(nn.Module):
    """Two branches, whose layers are called in turn."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.norm_first, self.norm_second = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        a, b = self.first(x), self.second(x)
        b = self.norm_second(b).relu()
        return self.norm_first(a) + b


class Branched(nn.Module):
    """A BatchNorm whose input is read by something else as well, in one of several ways."""

    def __init__(self, channels, read):
        super().__init__()
        self.conv, self.norm, self.read = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), read

    def forward(self, x):
        z = self.conv(x)
        return self.read(z, self.norm(z))


def tail():
    return nn.Flatten(), nn.LazyLinear(3)


BRANCHES = {
    "added": lambda z, y: z + y,
    "in a list": lambda z, y: torch.cat([z, y], 1),
    "in pieces": lambda z, y: y * z.chunk(2, 1)[1].mean((1, 2, 3), keepdim=True),
    "by its statistics": lambda z, y: y * torch.std_mean(z, (1, 2, 3), keepdim=True)[0],
    "detached": lambda z, y: y + z.detach(),
}

# Network → (its layers, a sample's shape, units: a map or normalisation, + the BatchNorm that is folded into it).
# Every parameter of a module that no unit names keeps the average. "tail" stands for a flattening and a head.
NETWORKS = {
    "one layer": (lambda: [nn.Flatten(), nn.Linear(6, 3)], (6,), "1"),
    "one layer, more unknowns": (lambda: [nn.Flatten(), nn.Linear(60, 3)], (60,), "1"),
    "one layer, no bias": (lambda: [nn.Linear(6, 3, bias=False)], (6,), "0"),
    "two layers": (lambda: [nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)], (6,), "0 2"),
    "convolutions": (lambda: [
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(inplace=True), *tail(),
    ], (2, 5, 5), "0+1 3+4 7"),
    "groups": (lambda: [
        nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2), *tail(),
    ], (4, 4, 4), "0+1 3 5"),
    "geometry": (lambda: [
        nn.Conv2d(2, 3, 3, stride=(2, 1), dilation=(1, 2), padding=(1, 2)), nn.BatchNorm2d(3), nn.Tanh(), *tail(),
    ], (2, 6, 5), "0+1 4"),
    "same": (lambda: [
        nn.Conv2d(2, 3, (1, 5), padding="same", bias=False), nn.BatchNorm2d(3), nn.Tanh(), *tail(),
    ], (2, 4, 5), "0+1 4"),
    "conv1d": (lambda: [nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Tanh(), *tail()], (3, 6), "0+1 4"),
    "linear and batchnorm": (
        lambda: [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)], (5,), "0+1 3"),
    "layernorm": (lambda: [nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), mean(), nn.Linear(6, 3)], (4, 5), "0 1 4"),
    "groupnorm": (lambda: [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), *tail()], (2, 5, 5), "0 1 4"),
    "batchnorm first": (
        lambda: [nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), *tail()], (2, 4, 4), "0 1 3 5"),
    "batchnorm over tokens": (
        lambda: [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), mean(), nn.Linear(6, 3)], (6, 5), "0 1 4"),
    "layer scale": (
        lambda: [nn.Linear(5, 6), nn.Tanh(), Scale(6), Shift(4, 6), mean(), nn.Linear(6, 3)], (4, 5), "0 2 5"),
    "one scale": (lambda: [nn.Linear(5, 6), nn.Tanh(), Scale(1), nn.Linear(6, 3)], (5,), "0 2 3"),
    "in turn": (lambda: [Parallel(2), *tail()], (2, 3, 3), "0.first 0.second+0.norm_second 0.norm_first 2"),
    "read once": (lambda: [Branched(2, lambda x, y: y), *tail()], (2, 3, 3), "0.conv+0.norm 2"),
    **{
        f"read {how}": (lambda read=read: [Branched(2, read), *tail()], (2, 3, 3), "0.conv 0.norm 2")
        for how, read in BRANCHES.items()
    },
}  # fmt: skip
# The same of attention, and the parameters that keep the average.
ATTENTION = {
    "attention": (lambda: [Attention(4, 2), nn.LayerNorm(4), mean(), nn.Linear(4, 3)], (5, 4), set()),
    "encoder layer": (
        lambda: [nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True), mean(), nn.Linear(4, 3)],
        (5, 4),
        set(),
    ),
    "vit": (
        lambda: [SmallViT(3, 8, 4, depth=1, heads=2, width=8, mlp_width=12)],
        (3, 8, 8),
        {"class_token", "encoder.pos_embedding"},
    ),
}
every_network = pytest.mark.parametrize("kind", NETWORKS)


@pytest.fixture(autouse=True)
def all_rows(monkeypatch):
    """Every position is a row, and all weigh alike, as in the reference."""
    monkeypatch.setattr("coin.merging.rows.LEAST", 10**9)
    monkeypatch.setattr("coin.merging.rows.position_weights", lambda *_: {})


def setup(make, shape, count=3):
    """Networks a little way from each other, and tasks with unequal numbers of samples."""
    draw = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    torch.manual_seed(0)
    initial = make().double().eval()
    initial(normal(2, *shape))  # lazy layers
    networks = [deepcopy(initial) for _ in range(count)]
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter += 0.3 * normal(*parameter.shape)
            for buffer in network.buffers():
                if buffer.ndim:
                    buffer += 0.3 * normal(*buffer.shape).abs()
    return networks, [normal(size, *shape) * (1 + i) + i for i, size in enumerate(SIZES[:count])]


def experts_of(networks, tasks):
    return Experts(networks, calibration=[task.split(4) for task in tasks])


def kind_of(name):
    make, shape, _ = (NETWORKS | ATTENTION)[name]
    return setup(lambda: make()[0] if name == "vit" else nn.Sequential(*make()), shape)


def answers(network, x):
    with torch.no_grad():
        return network(x)


def assert_answers_close(one, two, tasks, tolerance):
    for x in tasks:
        for inputs in (x, 0.7 * x.flip(0) - 0.1):  # those that it was fitted to, and others
            wanted = answers(two, inputs)
            size = float(wanted.abs().max())
            torch.testing.assert_close(answers(one, inputs), wanted, rtol=0, atol=tolerance * size)


def watched(network, name, x):
    """The input and the output of one module."""
    seen = []
    with network.get_submodule(name).register_forward_hook(lambda _, given, out: seen.append((given[0], out.clone()))):
        answers(network, x)
    ((given, out),) = seen
    return given, out


def design(module, x):
    """What a module's weight multiplies at all positions [n, G, K]."""
    if isinstance(module, nn.Conv1d):
        x, shape = x[..., None, :], lambda value: (1 if value is not module.padding else 0, *value)
    elif isinstance(module, nn.Conv2d):
        shape = lambda value: value  # noqa: E731
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        kernel, dilation, stride = (shape(each) for each in (module.kernel_size, module.dilation, module.stride))
        if module.padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            sides = [side for each in reversed(total) for side in (each // 2, each - each // 2)]
        else:
            sides = [side for each in reversed(shape(module.padding)) for side in (each, each)]
        columns = F.unfold(F.pad(x, sides), kernel, dilation, 0, stride)  # [N, C·k, L]
        return columns.mT.reshape(-1, module.groups, columns.shape[1] // module.groups)
    if isinstance(module, nn.Linear):
        return x.reshape(-1, 1, x.shape[-1])
    if isinstance(module, Scale):
        return x.reshape(-1, x.shape[-1] if module.gamma.numel() > 1 else 1, 1)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps).reshape(-1, x.shape[-1], 1)
    if isinstance(module, nn.GroupNorm):
        hat = F.group_norm(x, module.num_groups, eps=module.eps)
    else:
        hat = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    return hat.movedim(1, -1).reshape(-1, x.shape[1], 1)


def by_group(module, z):
    """A module's output at all positions [n, G, O]."""
    z = z.movedim(1, -1) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.GroupNorm | _BatchNorm) else z
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return z.reshape(-1, module.groups, z.shape[-1] // module.groups)
    if isinstance(module, nn.Linear):
        return z.reshape(-1, 1, z.shape[-1])
    return z.reshape(-1, 1 if isinstance(module, Scale) and module.gamma.numel() == 1 else z.shape[-1], 1)


def ridge_step(a, r, w, ridge, intercept):
    """The normal equations of one group: a [n, K], r [n, O], w [n]."""
    w = w / w.sum()
    mean_a, mean_r = (w @ each if intercept else 0 * (w @ each) for each in (a, r))
    a, r = a - mean_a, r - mean_r
    covariance = a.T @ (w[:, None] * a)
    lam = ridge * torch.trace(covariance) / len(covariance)
    step = torch.linalg.solve(covariance + lam * torch.eye(len(covariance), dtype=a.dtype), a.T @ (w[:, None] * r)).T
    return step, mean_r - step @ mean_a


@torch.no_grad()
def reference(networks, tasks, row, ridge, units, places=None, order=None):
    """Refit by the book: every layer's rows from the inputs anew, maps with their BatchNorm replaced by biased ones.

    By the names of weights `places` has the positions of every pooled sample, and `order` each task's among these.
    """
    coded = deepcopy(networks[0])
    for key, tensor in coded.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(sum(share * one.state_dict()[key] for share, one in zip(row, networks, strict=True)))
    for name, norm in units:
        if norm is None:
            continue
        module = coded.get_submodule(name)
        module.weight.zero_()
        module.bias = nn.Parameter(torch.zeros(len(module.weight), dtype=torch.float64))
        for share, one in zip(row, networks, strict=True):
            own, bn = one.get_submodule(name), one.get_submodule(norm)
            scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
            for k, factor in enumerate(scale):
                module.weight[k] += share * factor * own.weight[k]
            before = 0 if own.bias is None else own.bias
            module.bias += share * (bn.bias + scale * (before - bn.running_mean))
        parent, _, child = norm.rpartition(".")
        setattr(coded.get_submodule(parent), child, nn.Identity())
    for name, norm in units:
        rows = []
        for index, x in enumerate(tasks):
            given, output = watched(coded, name, x)
            wanted = watched(networks[index], norm or name, x)[1]
            module = coded.get_submodule(name)
            a, r = design(module, given), by_group(module, wanted - output)
            if places is not None:
                weight = f"{name}.{'gamma' if isinstance(module, Scale) else 'weight'}"
                at = places[weight][order[index]]
                at = (torch.arange(len(x))[:, None] * (len(a) // len(x)) + at).flatten()
                a, r = a[at], r[at]
            rows.append((a, r, torch.full((len(a),), row[index] / len(x), dtype=torch.float64)))
        a, r, w = (torch.cat(each) for each in zip(*rows, strict=True))
        bias = getattr(module, "bias", None)
        steps = [ridge_step(a[:, g], r[:, g], w, ridge, bias is not None) for g in range(a.shape[1])]
        weight = module.gamma if isinstance(module, Scale) else module.weight
        step = torch.cat([each for each, _ in steps])
        weight += step.reshape(weight.shape)
        if bias is not None:
            bias += torch.cat([each for _, each in steps])
    return coded


@pytest.mark.parametrize("rows", ["all", "drawn"])
@every_network
def test_it_is_the_regression_of_every_layer_in_turn(kind, rows, monkeypatch):
    networks, tasks = kind_of(kind)
    units = [(name, norm or None) for name, _, norm in (each.partition("+") for each in NETWORKS[kind][2].split())]
    experts, drawn = experts_of(networks, tasks), {}

    def places(units, order, weights, device, budget):
        draw = torch.Generator().manual_seed(5)
        for unit in units:
            each = (unit.positions + 1) // 2
            drawn[unit.weight] = torch.rand(len(order), unit.positions, generator=draw).argsort(1)[:, :each]
        return drawn

    if rows == "drawn":  # at half of the positions
        monkeypatch.setattr("coin.merging.rows.chosen_places", places)
    made = Refit(RIDGE, head=False).coded_model(experts, ROW)
    order = [(experts.tasks == task).nonzero().flatten() for task in range(3)]
    wanted = reference(networks, tasks, ROW, RIDGE, units, drawn or None, order)
    assert_answers_close(made.network, wanted, tasks, 1e-9)
    modules = tuple(f"{each}." for unit in units for each in unit if each)
    kept = [name for name, _ in networks[0].named_parameters() if not name.startswith(modules)]
    assert made.chosen == {"ridge": RIDGE, "averaged": sorted(kept)}


# Exact properties


@pytest.mark.parametrize("kind", [*NETWORKS, *ATTENTION])
def test_identical_experts_give_themselves(kind):
    head = kind != "one layer, no bias"  # which cannot be fitted
    (network, *_), tasks = kind_of(kind)
    experts = experts_of([network, deepcopy(network), deepcopy(network)], tasks)
    made = Refit(RIDGE, head=head).coded_model(experts, ROW)
    assert_answers_close(made.network, network, tasks, 1e-10)


@pytest.mark.parametrize("kind", ATTENTION)
def test_of_attention_only_what_is_no_affine_map_keeps_the_average(kind):
    networks, tasks = kind_of(kind)
    made = Refit(RIDGE, head=False).coded_model(experts_of(networks, tasks), ROW)
    assert made.chosen["averaged"] == sorted(ATTENTION[kind][2])
    average = average_parameters([dict(network.named_parameters()) for network in networks], ROW)
    for name, parameter in made.network.named_parameters():
        assert torch.equal(parameter, average[name]) == (name in ATTENTION[kind][2]), name


@pytest.mark.parametrize("kind", ["convolutions", "layer scale", "in turn", "vit"])
def test_of_drawn_rows_the_order_of_the_experts_does_not_matter(kind, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("coin.merging.rows.LEAST", 40)
    monkeypatch.setattr("coin.merging.rows.DEAR", 0)
    networks, tasks = kind_of(kind)
    made = []
    for order in ((0, 1, 2), (2, 0, 1)):
        experts = experts_of([networks[i] for i in order], [tasks[i] for i in order])
        made.append(Refit(RIDGE).coded_model(experts, [ROW[i] for i in order]))
    one, two = made
    assert_answers_close(one.network, two.network, tasks, 1e-9)


def test_a_deep_linear_network_reaches_the_mixture():
    make = lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 3))  # noqa: E731
    networks, tasks = setup(make, (4,))
    tasks = [torch.cat(tasks)] * len(tasks)  # on one set of samples all targets are the mixture
    made = Refit(1e-12, head=False).coded_model(experts_of(networks, tasks), ROW)
    for x in (tasks[0], torch.randn(5, 4, dtype=torch.float64)):
        wanted = sum(share * answers(network, x) for share, network in zip(ROW, networks, strict=True))
        torch.testing.assert_close(answers(made.network, x), wanted, rtol=1e-8, atol=1e-8)


# One regression


@pytest.mark.parametrize(("rows", "unknowns"), [(40, 6), (7, 20)], ids=["primal", "dual"])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("dead", ["none", "one input", "one group"])
def test_one_regression_in_either_form(rows, unknowns, intercept, dead, monkeypatch):
    monkeypatch.setattr("coin.statistics.solvers._HALVES", 4)  # from which width on products are taken by halves
    draw = torch.Generator().manual_seed(rows)
    a, r = (torch.randn(2, rows, width, generator=draw, dtype=torch.float64) + 1 for width in (unknowns, 3))
    w = torch.rand(rows, generator=draw, dtype=torch.float64) + 0.1
    if dead == "one input":
        a[0, :, 2] = 0.1
    if dead == "one group":
        a[0] = 0.1 * torch.arange(1, unknowns + 1)
    step, constant = fit_affine(a, r, w, 0.2, intercept=intercept)
    for g in range(2):
        if dead == "one group" and g == 0 and intercept:
            wanted = torch.zeros(3, unknowns, dtype=torch.float64), (w @ r[g]) / w.sum()
        else:
            wanted = ridge_step(a[g], r[g], w, 0.2, intercept)
        torch.testing.assert_close((step[g], constant[g]), wanted, rtol=1e-9, atol=1e-9)
    if dead == "one input" and intercept:
        assert float(step[0, :, 2].abs().max()) < 1e-9


def test_a_constant_input_of_one_number_gets_no_coefficient_from_rounding():
    """Float32, and a mean that is not the number itself."""
    draw = torch.Generator().manual_seed(0)
    a, r, w = torch.full((1, 1001, 1), 0.1), torch.randn(1, 1001, 2, generator=draw), torch.rand(1001, generator=draw)
    step, constant = fit_affine(a, r, w.double(), 0.03)
    assert not bool(step.any())
    torch.testing.assert_close(constant[0], (w.double() @ r[0].double()) / w.double().sum(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "message"), [(torch.inf, "not finite"), (1e30, "so large that squares overflow")])
def test_rows_that_cannot_be_squared_are_told(size, message):
    a = torch.tensor([1.0, -1.0, 2.0]).view(1, 3, 1) * size
    with pytest.raises(NumericalError, match=message) as caught:
        fit_affine(a, a, torch.ones(3).double(), 0.1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rows", "unknowns"), [(300, 20), (15, 20)], ids=["primal", "dual"])
def test_rows_that_lie_far_apart_and_weigh_unlike_lose_nothing_in_float32(rows, unknowns):
    draw = torch.Generator().manual_seed(1)
    a = torch.randn(1, rows, unknowns, generator=draw)
    a[:, : rows // 10] += 30
    r = a[..., :4] + 0.1 * torch.randn(1, rows, 4, generator=draw)
    w = torch.rand(rows, generator=draw, dtype=torch.float64) + 0.1
    w[: rows // 10] *= 1e-3
    w[0] = 0
    step, constant = fit_affine(a, r, w, 0.01)
    wanted = ridge_step(a[0].double(), r[0].double(), w, 0.01, True)
    torch.testing.assert_close((step[0], constant[0]), wanted, rtol=0, atol=3e-6)


# The two passes


def wide(seen=None):
    counts = Apply(lambda x: x if seen is None else seen.append(len(x)) or x)
    first = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()
    return nn.Sequential(counts, *first, nn.Conv2d(32, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1), *tail())


@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_every_network_runs_once_and_its_passes_are_counted(head):
    total, fitted = sum(SIZES), (3 + 1) * sum(SIZES) if head else 0
    seen = []
    experts = experts_of(*setup(lambda: wide(seen), (1, 8, 8)))
    seen.clear()
    Refit(RIDGE, head=head).coded_model(experts, ROW)
    assert experts.passes == PROBES + 2 * total + fitted
    backward = 2 * 3 * 2  # two cotangents of three samples, in the search for units
    copies = 3 * 2  # that a copy answers as the expert
    assert sum(seen) == experts.passes - backward + copies


def test_how_many_positions_are_chosen_and_where(monkeypatch):
    monkeypatch.undo()

    def chosen(positions, unknowns, outputs=1, is_convolution=True, budget=math.inf, **weights):
        unit = Unit("w", None, None, (positions, outputs), 1, outputs, unknowns, is_convolution)
        return chosen_places([unit], torch.arange(100), weights, torch.device("cpu"), budget)["w"]

    assert chosen(3, 10) is None  # 300 rows, and 256 are wanted: as many of every sample
    places = chosen(1000, 500, 500)  # half of 1,000 · 500 · 500 multiplications pay for 165 · 500 · (3 · 500 + 16)
    assert places.shape == (100, 165)
    stretches = places / (1000 / 165) - torch.arange(165)
    assert float(stretches.min()) > -165 / 1000
    assert float(stretches.max()) < 1
    # Half of them; 8 for every unknown; what 4 times their multiplications pay for, also of fewer rows than unknowns.
    for unknowns, outputs, each in ((100, 100, 11), (100, 25, 8), (100, 2, 5), (4000, 100, 15), (25, 1, 3)):
        assert chosen(64, unknowns, outputs).shape == (100, each)
    plenty, few = (chosen(1000, 4, 64, budget=budget).shape[1] for budget in (math.inf, 0))
    assert LEAST / 100 <= few < plenty  # where outputs do not fit no rows are added for being cheap
    weight = torch.full((1000,), 0.5)
    weight[7] = 500.5
    assert set((chosen(1000, 50, 50, False, w=weight) == 7).sum(1).tolist()) <= {75, 76, 77}


def test_tokens_weigh_by_how_the_outputs_depend_on_them(monkeypatch):
    monkeypatch.undo()
    seen = []
    first_token = Apply(lambda x: seen.append(len(x)) or x[:, 0])
    layers = nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), first_token, nn.Linear(5, 3)
    network, x = nn.Sequential(*layers).double().eval(), torch.randn(10, 7, 4, dtype=torch.float64)
    weights = position_weights(network, affine_units(network, x).units, x)
    assert seen[-10:] == [1] * 10, "a graph of many samples of a large transformer takes too much memory"
    first = torch.full((7,), 0.5, dtype=torch.float64)
    first[0] += 7 / 2
    assert weights.keys() == {"0.weight", "2.weight"}
    for weight in weights.values():
        torch.testing.assert_close(weight, first)
    with torch.no_grad():
        network[4].weight.zero_()
    assert position_weights(network, affine_units(network, x).units, x) == {}
    mixed = nn.Sequential(nn.Linear(4, 6), transposed(), nn.Linear(7, 2), nn.Flatten(), nn.Linear(12, 3)).double()
    found = position_weights(mixed, affine_units(mixed, x).units, x)["0.weight"]
    f = mixed(x) - mixed(x).mean(1, keepdim=True)
    head = mixed[4].weight.view(3, 6, 2)
    gradient = torch.einsum("nc,cko,ot->ntk", f, head, mixed[2].weight).square().sum(2).mean(0)
    torch.testing.assert_close(found, (0.5 + 0.5 * gradient / gradient.mean()).detach())


def test_of_a_small_vit_the_class_token_weighs_most_at_the_end(monkeypatch):
    networks, tasks = kind_of("vit")
    monkeypatch.undo()
    experts = experts_of(networks, tasks)
    made = Refit(RIDGE, head=False).coded_model(experts, ROW)
    assert experts.passes == PROBES + 2 * sum(SIZES) + 3 * sum(min(size, -(-PROBED // 3)) for size in SIZES)
    same = Refit().coded_model(experts_of([networks[0]] * 3, tasks), ROW)
    assert_answers_close(networks[0], same.network, tasks, 1e-9)
    monkeypatch.setattr("coin.merging.rows.position_weights", lambda *_: {})
    alike = Refit(RIDGE, head=False).coded_model(experts_of(networks, tasks), ROW)
    own = [(answers(each, x), x) for each, x in zip(networks, tasks, strict=True)]
    weighed, not_weighed = (
        sum(float((answers(one.network, x) - y).square().mean()) for y, x in own) for one in (made, alike)
    )
    assert weighed < not_weighed


def test_samples_that_do_not_fit_the_memory_are_left_out_with_a_warning():
    networks, tasks = setup(wide, (1, 8, 8))
    tasks = [task.repeat(12, 1, 1, 1) for task in tasks]
    experts = experts_of(networks, tasks)
    message = r"method 'refit' fits its layers on (\d+) of 408 calibration samples, which need memory_mib=(\d+)"
    with pytest.warns(CoinWarning, match=message) as told:
        Refit(RIDGE, head=False, memory_mib=2).coded_model(experts, ROW)
    samples, needed = map(int, re.search(message, str(told[0].message)).groups())
    assert experts.passes == PROBES + 2 * samples
    assert 2 / needed == pytest.approx(samples / 408, rel=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Refit(RIDGE, head=False, memory_mib=needed).coded_model(experts_of(networks, tasks), ROW)


def test_experts_may_run_once_for_every_layer_and_the_progress_is_of_all_passes(monkeypatch):
    @contextmanager
    def progress(what, total):
        done = []
        yield SimpleNamespace(update=done.append)
        assert all(isinstance(samples, int) for samples in done)
        told.append((what, total, sum(done)))

    monkeypatch.setattr("coin.merging.body.progress_bar", progress)
    monkeypatch.setattr("coin.merging.body.FEWEST_MIB", 0)
    networks, tasks = kind_of("two layers")
    found, told = [], []
    for groups, mib in ((1, 8192), (2, 3)):
        experts = experts_of(networks, tasks)
        found.append(Refit(head=False, memory_mib=mib).coded_model(experts, ROW).network.state_dict())
        every = groups * sum(SIZES)
        assert experts.passes == PROBES + every + sum(SIZES)
        assert told.pop() == ("refit, layers", every, every)
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())
    packed = Refit(head=False, compress={"bits": 4})
    coin.merge_networks(packed, networks, coin.Code([ROW]), calibration=[[task] for task in tasks])
    assert [what for what, *_ in told] == ["refit, layers", "refit, layers again, rounded"]


def test_an_expert_that_has_no_share_of_the_row_is_not_run():
    networks, tasks = kind_of("convolutions")
    experts, ran = experts_of(networks, tasks), []
    experts.networks[1].register_forward_pre_hook(lambda *_: ran.append(1))
    made = Refit(RIDGE, head=False).coded_model(experts, (0.4, 0.0, 0.6))
    assert not ran
    without = Refit(RIDGE, head=False).coded_model(experts_of(networks[::2], tasks[::2]), (0.4, 0.6))
    assert_answers_close(made.network, without.network, tasks, 1e-9)


def test_no_sample_of_a_task_with_a_share_and_a_ridge_that_is_too_small_are_one_line():
    networks, tasks = kind_of("two layers")
    experts = experts_of(networks, [tasks[0][:0], *tasks[1:]])
    for row in ((1.0, 0.0, 0.0), ROW):
        with pytest.raises(DataError, match=r"found no calibration samples of task 0, .* share in .* raise memory_mib"):
            Refit(RIDGE, head=False).coded_model(experts, row)
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 60), nn.Linear(60, 3)) for _ in "ab"]
    tasks = [torch.randn(200, 3) @ torch.randn(3, 40) for _ in networks]
    with pytest.raises(NumericalError, match="give a larger ridge"):
        Refit(1e-10).coded_model(Experts(networks, calibration=[[task] for task in tasks]), (0.5, 0.5))


def test_a_convolution_whose_taps_meet_no_image_keeps_its_weight():
    make = lambda: nn.Sequential(nn.Conv1d(2, 2, 2, padding=1, dilation=2), nn.Flatten(), nn.Linear(2, 3))  # noqa: E731
    networks, tasks = setup(make, (2, 1))
    made = Refit(RIDGE, head=False).coded_model(experts_of(networks, tasks), ROW)
    assert all(bool(torch.isfinite(answers(made.network, task)).all()) for task in tasks)


# What cannot be refitted


class ComputedBias(nn.Linear):
    """As the queries, keys and values of BEiT, whose keys have none."""

    def forward(self, x):
        return F.linear(x, self.weight, torch.cat([self.bias[:2], torch.zeros_like(self.bias[2:])]))


def test_a_layer_whose_bias_is_computed_keeps_the_average():
    (network, *_), tasks = setup(lambda: nn.Sequential(ComputedBias(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,))
    experts = experts_of([network, deepcopy(network), deepcopy(network)], tasks)
    made = Refit(RIDGE, head=False).coded_model(experts, ROW)
    assert made.chosen["averaged"] == ["0.bias", "0.weight"]
    assert_answers_close(made.network, network, tasks, 1e-10)


class Tied(nn.Module):
    """Tokens, with an embedding, positions, and layers that are read in several places."""

    def __init__(self):
        super().__init__()
        self.embedding, self.place = nn.Embedding(7, 4), nn.Parameter(torch.zeros(5, 4))
        self.capped = nn.Embedding(7, 4)
        self.twice, self.read, self.once = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.bias = nn.Linear(4, 4)
        self.bias.bias = self.twice.bias
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.capped.weight
        self.head = nn.Linear(7, 3)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.capped(tokens) + self.place
        x = self.bias(self.twice(self.twice(x).tanh()).tanh())
        x = self.read(x) * self.read.weight.square().mean()
        return self.head(self.tied(self.once(x).tanh()).mean(1))


AVERAGED = ["bias.weight", "capped.weight", "embedding.weight", "place", "read.bias", "read.weight"]
AVERAGED += ["twice.bias", "twice.weight"]


def test_what_cannot_be_refitted_keeps_the_average_and_is_named():
    torch.manual_seed(1)
    networks = [Tied().double() for _ in ROW]
    tasks = [torch.randint(7, (size, 5), generator=torch.Generator().manual_seed(size)) for size in SIZES]
    made = Refit(RIDGE).coded_model(experts_of(networks, tasks), ROW)
    assert made.chosen["averaged"] == AVERAGED
    average = average_parameters([dict(network.named_parameters()) for network in networks], ROW)
    for name, parameter in made.network.named_parameters():
        assert torch.equal(parameter, average[name]) == (name in AVERAGED), name
    same = experts_of([networks[0], *(deepcopy(networks[0]) for _ in range(2))], tasks)
    wanted = answers(networks[0], tasks[0])
    torch.testing.assert_close(answers(Refit().coded_model(same, ROW).network, tasks[0]), wanted, rtol=0, atol=1e-10)


class Arranged(nn.Module):
    """Tokens [B, T, 4] through two layers, in rows that lie sample by sample or otherwise."""

    def __init__(self, arrange):
        super().__init__()
        self.score, self.first = nn.Linear(4, 1), nn.Linear(4, 6)
        self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.arrange = arrange

    def forward(self, x):
        rows, back = self.arrange(x, self.score)
        return self.head(back(self.second(self.first(rows).tanh()).tanh()).mean(1))


def by_sample(x, score):
    return x.flatten(0, 1), lambda rows: rows.view(len(x), -1, rows.shape[1])


def by_time(x, score):
    return x.transpose(0, 1).flatten(0, 1), lambda rows: rows.view(-1, len(x), rows.shape[1]).transpose(0, 1)


def by_position(x, score):
    return x.transpose(0, 1), lambda rows: rows.transpose(0, 1)


def by_score(x, score):
    order = score(x).argsort(1)  # of an expert's own: in another network the rows lie otherwise
    return by_sample(torch.gather(x, 1, order.expand(x.shape)), score)


def by_detached_score(x, score):
    with torch.no_grad():
        order = score(x).detach().argsort(1)
    return by_sample(torch.gather(x, 1, order.expand(x.shape)), score)


@pytest.mark.parametrize("arrange", [by_sample, by_time, by_position, by_score, by_detached_score])
def test_rows_that_are_not_of_the_sample_that_they_are_taken_for_are_left_alone(arrange):
    """One function in three layouts: it took row r for sample r // k and looked at shapes alone."""
    networks, tasks = setup(lambda: Arranged(arrange), (3, 4))
    residuals = []
    for method in (Refit(head=False), Average()):
        made, x = method.coded_model(experts_of(networks, tasks), ROW), torch.cat(tasks)
        wanted = sum(share * answers(network, x) for share, network in zip(ROW, networks, strict=True))
        residuals.append(float((answers(made.network, x) - wanted).norm()))
        rows = {"first.weight", "first.bias", "second.weight", "second.bias"}
        if method.name == "refit":
            assert rows & set(made.chosen["averaged"]) == (set() if arrange is by_sample else rows)
    assert residuals[0] < residuals[1]


class Chosen(nn.Module):
    """Maps with a decision between them that activations make."""

    def __init__(self, choose):
        super().__init__()
        self.first, self.second, self.head, self.choose = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), choose

    def forward(self, x):  # [B, 4, 4]
        return self.head(torch.tanh(self.second(self.choose(self.first(x)))).mean(1))


def set_to_zero(x):
    y = x.clone()
    y[x < 0] = 0
    return y


IN_PLACE = {
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "mask": lambda x: x * (x > 0).to(x),
    "masked fill": lambda x: x.masked_fill(x.lt(0), 0),
    "set": set_to_zero,
    "rounded": lambda x: x + (x.round() - x).detach(),
    "masked attention": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=(x @ x.mT) > -9),
    "table": lambda x: x + (x.mean(1, keepdim=True) * torch.ones(4, 1))[:, torch.tensor([0, 1, 1, 3])],
}
PLACED = {
    "index": lambda x: x[(x > -9).all(2)].view(x.shape),
    "gathered": lambda x: x.gather(1, (0 * x).long()),
    "product": lambda x: torch.eye(4).expand(len(x), 4, 4).ge(x.mean((1, 2), keepdim=True)).type_as(x) @ x,
    "sorted": lambda x: x.sort(1).values,
    "looked up": lambda x: x[:, (0 * x[0, :, 0]).long()],
}


@pytest.mark.parametrize("name", [*IN_PLACE, *PLACED])
def test_only_what_places_rows_by_activations_keeps_maps_from_being_fitted(name):
    torch.manual_seed(0)
    network = Chosen({**IN_PLACE, **PLACED}[name]).eval()
    units = {unit.weight for unit in affine_units(network, torch.randn(3, 4, 4)).units}
    expected = {"first.weight", "head.weight"} | ({"second.weight"} if name in IN_PLACE else set())
    assert units == expected


class Unbatched(torch.autograd.Function):
    """The identity, whose backward pass goes through NumPy and so takes no batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.detach().numpy().copy())


def test_networks_whose_backward_pass_cannot_be_batched():
    networks, tasks = setup(lambda: nn.Sequential(nn.Linear(4, 6), Apply(Unbatched.apply), nn.Linear(6, 3)), (4,))
    assert Refit().coded_model(experts_of(networks, tasks), ROW).chosen["averaged"] == []


def test_a_network_without_a_layer_that_can_be_refitted_is_averaged():
    layer = nn.Linear(4, 4)
    experts = experts_of(*setup(lambda: nn.Sequential(layer, nn.Tanh(), layer), (4,)))
    with pytest.warns(CoinWarning, match="leaves 100% of the parameters of Sequential unfitted"):
        made = Refit(head=False).coded_model(experts, ROW)
    assert made.chosen["averaged"] == ["0.bias", "0.weight"]


def test_bfloat16_is_fitted_in_float32(monkeypatch):
    networks, tasks = kind_of("layernorm")
    types = set()

    def recorded(a, r, *options, **named):
        types.update({a.dtype, r.dtype})
        return fit_affine(a, r, *options, **named)

    monkeypatch.setattr("coin.merging.regression.fit_affine", recorded)
    made = Refit(RIDGE).coded_model(experts_of([network.bfloat16() for network in networks], tasks), ROW)
    assert types == {torch.float32}
    assert {parameter.dtype for parameter in made.network.parameters()} == {torch.bfloat16}


# The caller


def flags():
    kernels = [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "math")]
    modes = torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return *kernels, *modes, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("broken", ["nothing", "an expert", "the fit"])
def test_the_caller_finds_everything_as_it_was(broken, monkeypatch):
    layers = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4), nn.Linear(4, 3)
    networks, tasks = setup(lambda: nn.Sequential(*layers), (6,))
    for network in networks:
        network.train()
        network[1].eval()

    def breaks(*_):
        raise RuntimeError("broken off")

    if broken == "an expert":
        networks[1][3].register_forward_pre_hook(breaks)
    if broken == "the fit":
        monkeypatch.setattr("coin.merging.body.fit_unit", breaks)
    before, states = flags(), [deepcopy(network.state_dict()) for network in networks]
    with nullcontext() if broken == "nothing" else pytest.raises(RuntimeError, match=r"^broken off$"):
        Refit(RIDGE).coded_model(experts_of(networks, tasks), ROW)
    assert flags() == before
    for network, state in zip(networks, states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
        assert [each.training for each in network.modules()] == [True, True, False, True, True, True]
        assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_inside_a_callers_context(context):
    networks, tasks = kind_of("convolutions")
    wanted = Refit(ridge=RIDGE).coded_model(experts_of(networks, tasks), ROW)
    with context():
        found = Refit(ridge=RIDGE).coded_model(experts_of(deepcopy(networks), [task.clone() for task in tasks]), ROW)
    for name, tensor in wanted.network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], tensor)
    found.network(tasks[0]).sum().backward()  # an ordinary network that can be trained on


# Networks that go other ways


class Forks(nn.Module):
    """Takes the way that it was told: calls in another order, fewer of them, or of another shape."""

    def __init__(self):
        super().__init__()
        self.way = "straight"
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        if self.way == "shorter":
            return self.head(self.second(x))
        if self.way == "shortest":
            return self.second(self.first(x))[:, :3]
        if self.way == "longer":
            return self.head(self.second(self.first(x))) + self.head(x)
        if self.way == "turned":
            return self.head(self.first(self.second(x)))
        if self.way == "by size" and len(x) > 2:
            return self.head(self.first(x))
        x = self.first(x)
        return self.head(self.second(x))


@pytest.mark.parametrize(
    ("way", "who", "message"),
    [
        *((way, 1, "an expert calls other layers than") for way in ("shorter", "shortest", "longer", "turned")),
        ("by size", 0, "Forks makes other calls on two samples than on three, expected the same"),
    ],
)
def test_networks_that_make_other_calls_are_told_in_a_line(way, who, message):
    networks, tasks = setup(Forks, (6,))
    networks[who].way = way
    with pytest.raises(StateError, match=message) as caught:
        Refit(RIDGE).coded_model(experts_of(networks, tasks), ROW)
    assert "\n" not in str(caught.value)


def test_the_bound_on_activations_is_a_share_of_what_is_free_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 << 30, 8 << 30))
    assert coin.merging.body.default_memory_mib(torch.device("cuda", 0)) == 3 << 10
    assert coin.merging.body.default_memory_mib(torch.device("cpu")) == 8192


class Ordered(nn.Module):
    """Runs its samples in the order of their lengths, as with packed sequences, and puts them back."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        order = x[:, 0].argsort(stable=True)  # by a length, which is of the inputs alone
        rows = torch.tanh(self.first(x[order]))
        return self.head(torch.tanh(self.second(rows[order.argsort()])))


class Unpadded(nn.Module):
    """Takes padding out before its first layer, and puts zeros in its place afterwards."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):  # [B, 4, 5]
        used = x[..., 0] > 0
        rows = torch.tanh(self.first(x[used]))
        padded = rows.new_zeros(*x.shape[:2], 6).masked_scatter(used[..., None], rows)
        return self.head(torch.tanh(self.second(padded)).mean(1))


@pytest.mark.parametrize("kind", [Ordered, Unpadded])
def test_rows_that_inputs_place_are_not_fitted_though_the_first_samples_lie_in_order(kind):
    torch.manual_seed(0)
    networks = [kind().eval() for _ in range(2)]
    inputs = []
    for _ in networks:
        x = torch.randn(30, 5) if kind is Ordered else torch.randn(30, 4, 5)
        if kind is Ordered:
            x[:, 0] = torch.randint(1, 9, (30,))
            x[:4, 0] = 1  # as long as one another
        else:
            x[..., 0] = (torch.arange(4) < torch.randint(1, 5, (30, 1))).float()
            x[:4, :, 0] = 1  # without padding
        inputs.append([x])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoinWarning)
        made = Refit().coded_model(Experts(networks, calibration=inputs), (0.5, 0.5))
    assert made.chosen["averaged"] == ["first.bias", "first.weight"]
