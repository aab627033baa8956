"""Small tasks, networks and drawings of notebooks 01 and 02: plain PyTorch and Matplotlib."""

from copy import deepcopy

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from torch import nn
from torch.func import functional_call, jacrev, vmap

from coin.data import Digits
from coin.data.sampling import Stream, make_generator
from coin.reporting.figures import COLOURS, MARKERS, style

AXIS = torch.linspace(-4, 4, 161)
GRID = torch.cartesian_prod(AXIS, AXIS)
TASKS = {
    "A": {"centre": (-1.5, 0.0), "twist": 0.5},
    "B": {"centre": (1.5, 0.0), "twist": -0.5},
    "C": {"centre": (0.0, 1.5)},
}
"""Pinwheels: where their middle is, and how far their arms turn."""


def train(network, inputs, labels, steps, lr=5e-3, batch_size=64):
    """Train a network in place on random batches, and return it in eval mode."""
    optimiser = torch.optim.Adam(network.parameters(), lr)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (batch_size,))
        loss = nn.functional.cross_entropy(network(inputs[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


def digits(image_size, count):
    """Return a calibration sample of scikit-learn's digits."""
    data = Digits(image_size=image_size)
    data.prepare_data()
    data.setup("fit")
    return data.calibration(count)


def labels_of(samples):
    """Return the classes of `digits`' samples."""
    train = Digits().splits.train
    order = torch.randperm(
        len(train), generator=make_generator(0, Stream.CALIBRATION)
    )  # as `digits` are drawn
    return train.targets[order[: samples.num_samples]]


def digits_expert():
    """Return a network with one hidden layer of 16, trained on 8×8 digits, and these: [1000, 64], [1000]."""
    torch.manual_seed(0)
    samples = digits(8, 1000)
    (images,) = samples.stored
    pixels = images.flatten(1) / 255  # black is 0
    network = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    labels = labels_of(samples)
    return train(network, pixels, labels, steps=400).double(), pixels.double(), labels


def flat(parameters):
    """Return tensors by name as one vector."""
    return torch.cat([value.flatten() for value in parameters.values()])


def answer(network, theta, inputs):
    """Return a network's outputs with its parameters taken from one vector."""
    sizes = [value.numel() for value in network.parameters()]
    pieces = zip(network.named_parameters(), torch.split(theta, sizes), strict=True)
    return functional_call(
        network, {name: piece.view(value.shape) for (name, value), piece in pieces}, (inputs,)
    )


def jacobian(network, inputs):
    """Return the derivatives of every output by every parameter [P, C, number of parameters]."""
    theta = flat(dict(network.named_parameters())).detach()
    return vmap(lambda one: jacrev(lambda theta: answer(network, theta, one))(theta))(inputs)


def pinwheel(count, centre=(0.0, 0.0), twist=0.0):
    """Return points [count, 2] on four arms, and their classes."""
    labels = torch.arange(count) % 4
    radius = 0.1 + 2.2 * torch.rand(count).sqrt()
    angle = torch.pi * labels / 2 + twist * radius + 0.22 * torch.randn(count)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1) + torch.tensor(
        centre
    ), labels


def pinwheel_experts():
    """Return three experts fine-tuned from one start, and for each 3,000 test and 200 calibration points."""
    torch.manual_seed(0)
    layers = nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)
    base = train(nn.Sequential(*layers), *pinwheel(2000), steps=300, lr=3e-3, batch_size=128)
    experts = [
        train(deepcopy(base), *pinwheel(2000, **task), steps=300, lr=1e-3, batch_size=128)
        for task in TASKS.values()
    ]
    tests = [pinwheel(3000, **task) for task in TASKS.values()]
    return experts, tests, [pinwheel(200, **task)[0] for task in TASKS.values()]


def outputs(networks, points):
    """Return what networks answer [N, B, C]."""
    with torch.no_grad():
        return torch.stack([network(points) for network in networks])


def rms(values):
    """Return the root mean square."""
    return float(values.square().mean().sqrt())


def regions(logits, points=()):
    """Colour the plane by the class of the largest of logits [grid, 4], one panel a title; dots are points."""
    with style():
        _, panels = plt.subplots(1, len(logits), figsize=(2.8 * len(logits), 3.1))
        for axes, (title, values) in zip(panels, logits.items(), strict=True):
            classes = values.argmax(1).reshape(len(AXIS), -1).T
            pale = ListedColormap(COLOURS[:4])
            axes.pcolormesh(AXIS, AXIS, classes, cmap=pale, vmin=-0.5, vmax=3.5, alpha=0.3)
            axes.set(title=title, xticks=[], yticks=[], aspect="equal")
            axes.grid(visible=False)
            if len(points):
                axes.scatter(*points.T, s=3, color="black", linewidths=0)


def curves(xs, panels, **options):
    """Draw lines over xs: for each panel its title and values by name."""
    with style():
        _, every = plt.subplots(
            1, len(panels), figsize=(max(5.0, 4.2 * len(panels)), 3.3), squeeze=False
        )
        for axes, (title, lines) in zip(every[0], panels.items(), strict=True):
            for index, (name, values) in enumerate(lines.items()):
                axes.plot(
                    xs,
                    values,
                    color=COLOURS[index],
                    marker=MARKERS[index],
                    markersize=4,
                    label=name,
                )
            axes.set(title=title, **options)
            axes.legend()


def scatters(panels, **options):
    """Draw dots on logarithmic axes: for each panel its title and (x, y) by name."""
    with style():
        _, every = plt.subplots(
            1, len(panels), figsize=(max(5.0, 4.2 * len(panels)), 3.4), squeeze=False
        )
        for axes, (title, dots) in zip(every[0], panels.items(), strict=True):
            for index, (name, (x, y)) in enumerate(dots.items()):
                axes.scatter(
                    x, y, s=8, color=COLOURS[index], marker=MARKERS[index], linewidths=0, label=name
                )
            axes.set(title=title, xscale="log", yscale="log", **options)
            axes.legend(markerscale=2)


def images(pictures, **options):
    """Draw matrices side by side, one panel a title, on one scale."""
    with style():
        figure, every = plt.subplots(
            1, len(pictures), figsize=(3.1 * len(pictures), 2.8), squeeze=False
        )
        for axes, (title, values) in zip(every[0], pictures.items(), strict=True):
            image = axes.imshow(values, cmap="cividis", interpolation="nearest", **options)
            axes.set(title=title, xticks=[], yticks=[])
            axes.grid(visible=False)
        figure.colorbar(image, ax=list(every[0]))
