"""Small networks of every kind of layer, experts near one another, and their tasks."""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

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


class ComputedBias(nn.Linear):
    """As the queries, keys and values of BEiT, whose keys have none."""

    def forward(self, x):
        zeros = torch.zeros_like(self.bias[2:])
        return F.linear(x, self.weight, torch.cat([self.bias[:2], zeros]))


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
    """A BatchNorm whose input z something else reads as well, in one of several ways."""

    def __init__(self, read):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.norm = nn.BatchNorm2d(2)
        self.read = read

    def forward(self, x):
        z = self.conv(x)
        return self.read(z, self.norm(z))


def gate(z):
    """A number for each sample, of a piece of z."""
    _, second = z.chunk(2, 1)
    return second.mean((1, 2, 3), keepdim=True)


class Shared(nn.Module):
    """An embedding, positions, and layers that are read in several places."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.place = nn.Parameter(torch.zeros(5, 4))
        self.twice = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)
        self.once = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        tokens = (9 * x).long() % 7
        x = self.embedding(tokens) + self.place
        x = self.twice(self.twice(x).tanh()).tanh()
        x = self.read(x) * self.read.weight.square().mean()
        return self.head(self.once(x).mean(1))


class Case(NamedTuple):
    """A network: its layers, the shape of a sample, and names."""

    layers: Callable[[], list[nn.Module]]
    shape: tuple[int, ...]
    names: list[str]


def tail():
    """A flattening and a head."""
    return nn.Flatten(), nn.LazyLinear(3)


IMAGE = (2, 3, 3)
BRANCHES = ["0.conv", "0.norm", "2"]
# With the names of their units: a map, a norm, or both where the norm is folded in.
NETWORKS = {
    "more unknowns": Case(lambda: [nn.Linear(60, 3)], (60,), ["0"]),
    "no bias": Case(lambda: [nn.Linear(6, 3, bias=False)], (6,), ["0"]),
    "two layers": Case(
        lambda: [nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)],
        (6,),
        ["0", "2"],
    ),
    "convolutions": Case(
        lambda: [
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 3, 3, stride=2),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            *tail(),
        ],
        (2, 5, 5),
        ["0+1", "3+4", "7"],
    ),
    "groups": Case(
        lambda: [
            nn.Conv2d(4, 8, 3, groups=4),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1, groups=2),
            *tail(),
        ],
        (4, 4, 4),
        ["0+1", "3", "5"],
    ),
    "geometry": Case(
        lambda: [
            nn.Conv2d(2, 3, 3, stride=(2, 1), dilation=(1, 2), padding=(1, 2)),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            *tail(),
        ],
        (2, 6, 5),
        ["0+1", "4"],
    ),
    "in time": Case(
        lambda: [nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Tanh(), *tail()],
        (3, 6),
        ["0+1", "4"],
    ),
    "one pixel": Case(lambda: [nn.Conv2d(3, 5, 3, padding=1), *tail()], (3, 1, 1), ["0", "2"]),
    "padding alone": Case(
        lambda: [nn.Conv1d(2, 2, 2, padding=1, dilation=2), *tail()],
        (2, 1),
        ["0", "2"],
    ),
    "linear norm": Case(
        lambda: [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)],
        (5,),
        ["0+1", "3"],
    ),
    "layer norm": Case(
        lambda: [nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), mean(), nn.Linear(6, 3)],
        (4, 5),
        ["0", "1", "4"],
    ),
    "group norm": Case(
        lambda: [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), *tail()],
        (2, 5, 5),
        ["0", "1", "4"],
    ),
    "norm first": Case(
        lambda: [nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), *tail()],
        (2, 4, 4),
        ["0", "1", "3", "5"],
    ),
    "norm of tokens": Case(
        lambda: [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), mean(), nn.Linear(6, 3)],
        (6, 5),
        ["0", "1", "4"],
    ),
    "layer scale": Case(
        lambda: [nn.Linear(5, 6), nn.Tanh(), Scale(6), Shift(4, 6), mean(), nn.Linear(6, 3)],
        (4, 5),
        ["0", "2", "5"],
    ),
    "one scale": Case(
        lambda: [nn.Linear(5, 6), nn.Tanh(), Scale(), nn.Linear(6, 3)],
        (5,),
        ["0", "2", "3"],
    ),
    "in turn": Case(
        lambda: [Parallel(), *tail()],
        IMAGE,
        ["0.first", "0.second+0.norm_second", "0.norm_first", "2"],
    ),
    "read twice": Case(lambda: [Branched(lambda z, y: z + y), *tail()], IMAGE, BRANCHES),
    "read in pieces": Case(lambda: [Branched(lambda z, y: y * gate(z)), *tail()], IMAGE, BRANCHES),
    "read detached": Case(
        lambda: [Branched(lambda z, y: y + z.detach()), *tail()],
        IMAGE,
        BRANCHES,
    ),
}
# With the names of the parameters that keep the average.
PARTLY_FITTED = {
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
    "computed bias": Case(
        lambda: [ComputedBias(6, 5), nn.Tanh(), nn.Linear(5, 3)],
        (6,),
        ["0.bias", "0.weight"],
    ),
    "shared": Case(
        lambda: [Shared()],
        (5,),
        [
            "0.embedding.weight",
            "0.place",
            "0.read.bias",
            "0.read.weight",
            "0.twice.bias",
            "0.twice.weight",
        ],
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
    case = (NETWORKS | PARTLY_FITTED)[kind]
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
