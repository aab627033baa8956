"""Refit against regressions written out layer by layer, and what every network and every caller may rely on."""

import threading
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from coin.cli import main
from coin.data.tasks import Tasks, task_with
from coin.errors import ConfigurationError, NumericalError, StateError
from coin.experiment.experts import ExpertFiles
from coin.experiment.merge import StoredExperts
from coin.merging import Experts, Refit
from coin.merging.average import average_parameters
from coin.merging.lockstep import Walk
from coin.merging.refit import RIDGES, affine_units, fit_affine
from coin.networks import load_network
from coin.networks.small import SmallViT

ROW = (0.2, 0.3, 0.5)
SIZES = (9, 14, 11)
RIDGE = 0.03


class MatMul(nn.Module):
    """A fully connected layer as GPT-2 has it, its weight [in, out]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        if x.ndim == 2:
            return torch.addmm(self.bias, x, self.weight)
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


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


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        return x.mean(1)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


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


def nothing(x, y):
    return y


def tail(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


BRANCHES = {
    "added": lambda z, y: z + y,
    "in a list": lambda z, y: torch.cat([z, y], 1),
    "in pieces": lambda z, y: y * z.chunk(2, 1)[1].mean((1, 2, 3), keepdim=True),
    "by its statistics": lambda z, y: y * torch.std_mean(z, (1, 2, 3), keepdim=True)[0],
    "detached": lambda z, y: y + z.detach(),
}

# Network → (what makes it, a sample's shape, units as (map or normalisation, the BatchNorm folded into it)).
# Every parameter of a module that no unit names keeps the average.
NETWORKS = {
    "one layer": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), (6,), [("1", None)]),
    "one layer, more unknowns": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(60, 3)), (60,), [("1", None)]),
    "one layer, no bias": (lambda: nn.Sequential(nn.Linear(6, 3, bias=False)), (6,), [("0", None)]),
    "two layers": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
        (6,),
        [("0", None), ("2", None)],
    ),
    "convolutions": (
        lambda: tail(
            nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
        ),
        (2, 5, 5),
        [("0", "1"), ("3", "4"), ("7", None)],
    ),
    "groups": (
        lambda: tail(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2)),
        (4, 4, 4),
        [("0", "1"), ("3", None), ("5", None)],
    ),
    "geometry": (
        lambda: tail(nn.Conv2d(2, 3, 3, stride=(2, 1), dilation=(1, 2), padding=(1, 2)), nn.BatchNorm2d(3), nn.Tanh()),
        (2, 6, 5),
        [("0", "1"), ("4", None)],
    ),
    "same, uneven": (
        lambda: tail(nn.Conv2d(2, 3, (2, 4), padding="same", bias=False), nn.BatchNorm2d(3), nn.Tanh()),
        (2, 4, 5),
        [("0", "1"), ("4", None)],
    ),
    "conv1d": (
        lambda: tail(nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Tanh()), (3, 6), [("0", "1"), ("4", None)]
    ),
    "linear and batchnorm": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
        (5,),
        [("0", "1"), ("3", None)],
    ),
    "layernorm": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), Mean(), nn.Linear(6, 3)),
        (4, 5),
        [("0", None), ("1", None), ("4", None)],
    ),
    "groupnorm": (
        lambda: tail(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()),
        (2, 5, 5),
        [("0", None), ("1", None), ("4", None)],
    ),
    "batchnorm first": (
        lambda: tail(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3)),
        (2, 4, 4),
        [("0", None), ("1", None), ("3", None), ("5", None)],
    ),
    "addmm": (
        lambda: nn.Sequential(MatMul(5, 6), nn.GELU(), Mean(), MatMul(6, 4), nn.ReLU(), nn.Linear(4, 3)),
        (4, 5),
        [("0", None), ("3", None), ("5", None)],
    ),
    "addmm and batchnorm": (
        lambda: nn.Sequential(MatMul(5, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
        (5,),
        [("0", None), ("1", None), ("3", None)],
    ),
    "batchnorm over tokens": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), Mean(), nn.Linear(6, 3)),
        (6, 5),
        [("0", None), ("1", None), ("4", None)],
    ),
    "layer scale": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Scale(6), Shift(4, 6), Mean(), nn.Linear(6, 3)),
        (4, 5),
        [("0", None), ("2", None), ("5", None)],
    ),
    "one scale": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Scale(1), nn.Linear(6, 3)),
        (5,),
        [("0", None), ("2", None), ("3", None)],
    ),
    "in turn": (
        lambda: tail(Parallel(2)),
        (2, 3, 3),
        [("0.first", None), ("0.second", "0.norm_second"), ("0.norm_first", None), ("2", None)],
    ),
    **{
        f"read {how}": (
            lambda read=read: tail(Branched(2, read)),
            (2, 3, 3),
            [("0.conv", None), ("0.norm", None), ("2", None)],
        )
        for how, read in BRANCHES.items()
    },
    "read once": (lambda: tail(Branched(2, nothing)), (2, 3, 3), [("0.conv", "0.norm"), ("2", None)]),
}  # fmt: skip
ATTENTION = {
    "attention": (lambda: nn.Sequential(Attention(4, 2), nn.LayerNorm(4), Mean(), nn.Linear(4, 3)), (5, 4), set()),
    "encoder layer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True), Mean(), nn.Linear(4, 3)
        ),
        (5, 4),
        set(),
    ),
    "vit": (
        lambda: SmallViT(3, 8, 4, depth=1, heads=2, width=8, mlp_width=12),
        (3, 8, 8),
        {"class_token", "encoder.pos_embedding"},
    ),
}
every_network = pytest.mark.parametrize("kind", NETWORKS)
every_target = pytest.mark.parametrize("target", ["own", "mix"])


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
    make, shape, _ = NETWORKS[name] if name in NETWORKS else ATTENTION[name]
    return setup(make, shape)


def answers(network, x):
    with torch.no_grad():
        return network(x)


def assert_answers_close(one, two, tasks, tolerance):
    for x in tasks:
        for inputs in (x, 0.7 * x.flip(0) - 0.1):  # those that it was fitted to, and others
            wanted = answers(two, inputs)
            size = float(wanted.abs().max())
            torch.testing.assert_close(answers(one, inputs), wanted, rtol=0, atol=tolerance * size)


# The reference


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
    if isinstance(module, nn.Linear | MatMul):
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
    if isinstance(module, nn.Linear | MatMul):
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
def reference(networks, tasks, row, target, ridge, units):
    """Refit by the book: every layer's rows from the inputs anew, maps with their BatchNorm replaced by biased ones."""
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
            theirs = [watched(one, norm or name, x)[1] for one in networks]
            if target == "own":
                wanted, share = theirs[index], row[index] / len(x)
            else:
                wanted, share = sum(b * z for b, z in zip(row, theirs, strict=True)), 1.0
            module = coded.get_submodule(name)
            a, r = design(module, given), by_group(module, wanted - output)
            rows.append((a, r, torch.full((len(a),), share, dtype=torch.float64)))
        a, r, w = (torch.cat(each) for each in zip(*rows, strict=True))
        bias = getattr(module, "bias", None)
        steps = [ridge_step(a[:, g], r[:, g], w, ridge, bias is not None) for g in range(a.shape[1])]
        weight = module.gamma if isinstance(module, Scale) else module.weight
        step = torch.cat([each for each, _ in steps])
        weight += (step.T if isinstance(module, MatMul) else step).reshape(weight.shape)
        if bias is not None:
            bias += torch.cat([each for _, each in steps])
    return coded


@every_target
@every_network
def test_it_is_the_regression_of_every_layer_in_turn(kind, target):
    networks, tasks = kind_of(kind)
    units = NETWORKS[kind][2]
    made = Refit(target, RIDGE, head=False).make(experts_of(networks, tasks), ROW)
    wanted = reference(networks, tasks, ROW, target, RIDGE, units)
    assert_answers_close(made.network, wanted, tasks, 1e-9)
    modules = tuple(f"{each}." for unit in units for each in unit if each)
    kept = [name for name, _ in networks[0].named_parameters() if not name.startswith(modules)]
    assert made.chosen == {"target": target, "ridge": RIDGE, "averaged": sorted(kept)}
