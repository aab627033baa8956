"""Small networks of every kind of layer, experts near one another, and their tasks."""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from coin.merging import Experts
from coin.networks.small import SmallViT

ROW = (0.2, 0.3, 0.5)
SIZES = (2, 4, 3)  # samples of a task: so few that all positions are rows of the regressions


class Scale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return x * self.weight


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
        attended, _ = super().forward(x, x, x, need_weights=False)
        return attended


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def mean():
    return Apply(lambda x: x.mean(1))


def perceptron(*widths):
    """Layers of these widths with tanh between."""
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Parallel(nn.Module):
    """Two branches, whose layers are called in turn."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 2, 1)
        self.second = nn.Conv2d(2, 2, 1)
        self.norm_first = nn.BatchNorm2d(2)
        self.norm_second = nn.BatchNorm2d(2)

    def forward(self, x):
        a = self.first(x)
        b = self.second(x)
        b = self.norm_second(b).relu()
        return self.norm_first(a) + b


class Branched(nn.Module):
    """A BatchNorm whose input z something else may read as well, in one of several ways."""

    def __init__(self, read):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.norm = nn.BatchNorm2d(2)
        self.read = read

    def forward(self, x):
        z = self.conv(x)
        return self.read(z, self.norm(z))


class Case(NamedTuple):
    """A network: its layers; the shape of a sample; its units, a map or a norm, or both, if the norm is folded in."""

    layers: Callable[[], list[nn.Module]]
    shape: tuple[int, ...]
    units: list[str]


def tail():
    """A flattening and a head."""
    return nn.Flatten(), nn.LazyLinear(3)


def convolutions():
    return [
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 3, stride=2),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        *tail(),
    ]


def groups():
    return [
        nn.Conv2d(4, 8, 3, groups=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1, groups=2),
        *tail(),
    ]


def geometry():
    layer = nn.Conv2d(
        2,
        3,
        3,
        stride=(2, 1),
        dilation=(1, 2),
        padding=(1, 2),
    )
    return [
        layer,
        nn.BatchNorm2d(3),
        nn.Tanh(),
        *tail(),
    ]


def in_time():
    return [
        nn.Conv1d(3, 4, 3, padding=1),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        *tail(),
    ]


def linear_norm():
    return [
        nn.Linear(5, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 3),
    ]


def layer_norm():
    return [
        nn.Linear(5, 6),
        nn.LayerNorm(6),
        nn.GELU(),
        mean(),
        nn.Linear(6, 3),
    ]


def group_norm():
    return [
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        *tail(),
    ]


def norm_first():
    return [
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 3, 3),
        nn.ReLU(),
        nn.BatchNorm2d(3),
        *tail(),
    ]


def norm_of_tokens():
    return [
        nn.Linear(5, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        mean(),
        nn.Linear(6, 3),
    ]


def layer_scale():
    return [
        nn.Linear(5, 6),
        nn.Tanh(),
        Scale(6),
        Shift(4, 6),
        mean(),
        nn.Linear(6, 3),
    ]


def one_scale():
    return [
        nn.Linear(5, 6),
        nn.Tanh(),
        Scale(),
        nn.Linear(6, 3),
    ]


def two_layers():
    return [
        nn.Linear(6, 8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 3),
    ]


def in_turn():
    return [Parallel(), *tail()]


def branched(read):
    """Of how z and norm(z) are read: a network where they are."""
    return lambda: [Branched(read), *tail()]


def gate(z):
    """A number for each sample, of a piece of z."""
    _, second = z.chunk(2, 1)
    return second.mean((1, 2, 3), keepdim=True)


PARTS = ["0.first", "0.second+0.norm_second", "0.norm_first", "2"]
BRANCHES = ["0.conv", "0.norm", "2"]
IMAGE = (2, 3, 3)
NETWORKS = {
    "more unknowns": Case(lambda: [nn.Linear(60, 3)], (60,), ["0"]),
    "no bias": Case(lambda: [nn.Linear(6, 3, bias=False)], (6,), ["0"]),
    "two layers": Case(two_layers, (6,), ["0", "2"]),
    "convolutions": Case(convolutions, (2, 5, 5), ["0+1", "3+4", "7"]),
    "groups": Case(groups, (4, 4, 4), ["0+1", "3", "5"]),
    "geometry": Case(geometry, (2, 6, 5), ["0+1", "4"]),
    "in time": Case(in_time, (3, 6), ["0+1", "4"]),
    "linear norm": Case(linear_norm, (5,), ["0+1", "3"]),
    "layer norm": Case(layer_norm, (4, 5), ["0", "1", "4"]),
    "group norm": Case(group_norm, (2, 5, 5), ["0", "1", "4"]),
    "norm first": Case(norm_first, (2, 4, 4), ["0", "1", "3", "5"]),
    "norm of tokens": Case(norm_of_tokens, (6, 5), ["0", "1", "4"]),
    "layer scale": Case(layer_scale, (4, 5), ["0", "2", "5"]),
    "one scale": Case(one_scale, (5,), ["0", "2", "3"]),
    "in turn": Case(in_turn, IMAGE, PARTS),
    "read once": Case(branched(lambda z, y: y), IMAGE, ["0.conv+0.norm", "2"]),
    "read twice": Case(branched(lambda z, y: z + y), IMAGE, BRANCHES),
    "read in pieces": Case(branched(lambda z, y: y * gate(z)), IMAGE, BRANCHES),
    "read detached": Case(branched(lambda z, y: y + z.detach()), IMAGE, BRANCHES),
}
# Of attention it is known which parameters keep the average.
ATTENTION = {
    "attention": Case(
        lambda: [Attention(4, 2), nn.LayerNorm(4), mean(), nn.Linear(4, 3)],
        (5, 4),
        [],
    ),
    "encoder layer": Case(
        lambda: [nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), mean(), nn.Linear(4, 3)],
        (5, 4),
        [],
    ),
    "vit": Case(
        lambda: [SmallViT(3, 8, 4, depth=1, heads=2, width=8, mlp_width=12)],
        (3, 8, 8),
        ["0.class_token", "0.encoder.pos_embedding"],
    ),
}


def near_experts(make, shape, sizes=SIZES):
    """Networks in float64 a little way from each other, and tasks with unequal numbers of samples."""
    draw = torch.Generator().manual_seed(3)

    def normal(size):
        return torch.randn(size, generator=draw, dtype=torch.float64)

    torch.manual_seed(0)
    initial = make().double().eval()
    initial(normal((2, *shape)))  # lazy layers
    networks = []
    tasks = []
    for index, size in enumerate(sizes):
        network = deepcopy(initial)
        for parameter in network.parameters():
            parameter.data += 0.3 * normal(parameter.shape)
        for buffer in network.buffers():
            if buffer.ndim > 0:
                buffer += 0.3 * normal(buffer.shape).abs()
        networks.append(network)
        tasks.append(normal((size, *shape)) * (1 + index) + index)
    return networks, tasks


def case_of(kind, sizes=SIZES):
    case = (NETWORKS | ATTENTION)[kind]
    return near_experts(lambda: nn.Sequential(*case.layers()), case.shape, sizes)


def experts_of(networks, tasks):
    return Experts(networks, calibration=[task.split(4) for task in tasks])


@torch.no_grad()
def answers(network, x):
    return network(x)


def mixture(networks, row, x):
    """Return Σ_i β_i f_i(x)."""
    return sum(share * answers(network, x) for share, network in zip(row, networks, strict=True))


def assert_same_tensors(network, other):
    expected = other.state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def assert_answers_close(one, other, tasks, tolerance):
    """Compare answers to the inputs that a network was fitted to, and to others."""
    seen = torch.cat(tasks)
    unseen = 0.7 * seen.flip(0) - 0.1
    for inputs in (seen, unseen):
        wanted = answers(other, inputs)
        atol = tolerance * float(wanted.abs().max())
        torch.testing.assert_close(answers(one, inputs), wanted, rtol=0, atol=atol)


def distance(network, other, x):
    """How far a network's answers are from another's, relative to these."""
    wanted = answers(other, x)
    return float((answers(network, x) - wanted).norm() / wanted.norm())
