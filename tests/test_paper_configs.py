"""The paper's experiments and those beyond it: every file, on stand-ins with the sets' shapes, sizes and classes."""

from dataclasses import replace
from functools import partialmethod
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from coin import data
from coin.commands.run import read_experiment
from coin.data import Samples, Source, TextFile
from coin.data.tasks import Tasks
from coin.modules import Expert

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent / "configs"
BASE = ROOT / "experiment/paper/base.yaml"
PAIRS = sorted(path for path in BASE.parent.glob("*.yaml") if path != BASE)
FILES = [*sorted((ROOT / "experiment/beyond").glob("*.yaml")), *PAIRS]
NAMES = ("mnist", "fashionmnist", "kmnist", "svhn", "cifar10", "gtsrb", "stl10")

# Channels, side, training and test images and classes as torchvision has them; GTSRB is resized when it is read.
REAL = {
    data.MNIST: (1, 28, 60_000, 10_000, 10),
    data.FashionMNIST: (1, 28, 60_000, 10_000, 10),
    data.KMNIST: (1, 28, 60_000, 10_000, 10),
    data.SVHN: (3, 32, 73_257, 26_032, 10),
    data.CIFAR10: (3, 32, 50_000, 10_000, 10),
    data.GTSRB: (3, None, 26_640, 12_630, 43),
    data.STL10: (3, 96, 5_000, 8_000, 10),
}


def one_image(task, sizes):
    """Return one image many times."""
    channels, side, *counts, classes = sizes
    length = side or task.image_size
    image = torch.randint(256, (channels, length, length), dtype=torch.uint8)
    train, test = (
        Samples.of(image.expand(count, -1, -1, -1), torch.arange(count) % classes)
        for count in counts
    )
    return Source(train, test)


def texts(task):
    """Return tokens of as many texts as a domain has, in 15 classes."""
    tokens = torch.randint(1, 1000, (1_500, task.max_tokens))
    samples = Samples.of(tokens, torch.arange(1_500) % 15)
    return Source(samples, samples.subset(range(450)))


@pytest.fixture(autouse=True)
def stand_ins(packaged_encoder, monkeypatch):
    """Nothing is downloaded: every set holds one image of the real shape many times, under the real labels."""
    for kind, sizes in REAL.items():
        monkeypatch.setattr(kind, "load", partialmethod(one_image, sizes))
        monkeypatch.setattr(kind, "prepare_data", lambda self: None)
    monkeypatch.setattr(TextFile, "load", texts)
    monkeypatch.setattr(TextFile, "classes", tuple(map(str, range(15))))


def options_of(path):
    """Return the options with which a file is run: a pair's lies over what all pairs share."""
    under = ["-c", str(BASE)] if path in PAIRS else []
    return [*under, "-c", str(path)]


def test_every_pair_of_sets_has_a_file_that_says_how_to_run_it():
    pairs = {f"{first}-{second}" for first, second in combinations(NAMES, 2)}
    assert {path.stem for path in PAIRS} == pairs
    for path in PAIRS:
        command = " ".join(["coin run", *options_of(path)]).replace(f"{ROOT.parent}/", "")
        assert f"#   {command}\n" in path.read_text()


def file_name(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", PAIRS, ids=file_name)
def test_a_pair_is_what_the_paper_measures(path):
    experiment, _ = read_experiment(options_of(path))
    most = 4500 if "stl10" in path.stem else 7000
    labels = ["average", "coin", "regmean", "distillation", f"distillation-{most}"]
    assert [method.label for method in experiment.methods] == labels
    assert experiment.methods[-1].samples_per_task == most
    assert len(experiment.seeds) == 5
    assert experiment.expert.batch_size == 128
    assert experiment.network.weights == "IMAGENET1K_V2"
    for task in path.stem.split("-"):
        assert experiment.expert.of(task).epochs == (30 if task == "stl10" else 5)


@pytest.mark.parametrize("path", FILES, ids=file_name)
def test_tasks_networks_and_samples_fit_together(path):
    experiment, _ = read_experiment(options_of(path))
    assert experiment.name.endswith(path.stem)
    assert experiment.seeds[:3] == [0, 1, 2]
    names = {type(method).__name__ for method in experiment.methods}
    assert names >= {"Average", "Coin", "Distillation"}
    assert experiment.network.weights is not None or experiment.base is not None
    most = max(method.samples_per_task or 200 for method in experiment.methods)
    tasks = Tasks(experiment.tasks, most, batch_size=2)
    tasks.setup()
    size = experiment.network.image_size
    for task in tasks.tasks.values():
        inputs, labels = task.on_after_batch_transfer(next(iter(task.train_dataloader())), 0)
        assert isinstance(task, TextFile) or inputs.shape == (len(labels), 3, size, size)
        assert int(labels.max()) < task.num_classes
        if type(task) in REAL:
            assert task.num_classes == REAL[type(task)][-1]
    assert tasks.calibration().num_samples == most * len(tasks.tasks)


NETWORKS = ["eight-experts", "convnext_tiny", "vit_b_16", "vit-small", "text", "cifar10-gtsrb"]
"""A file of every architecture."""


@pytest.mark.parametrize("name", NETWORKS)
def test_one_batch_through_the_real_network(name):
    (path,) = (path for path in FILES if path.stem == name)
    classes = 43 if path in PAIRS else 15
    experiment, _ = read_experiment(options_of(path))
    # The weights are not here, and their names were checked when parsed.
    config = replace(experiment.network, weights=None)
    expert = Expert(config.name, config.image_size, options=config.options, num_classes=classes)
    task = next(iter(experiment.tasks.values()))
    task.setup()
    images, labels = next(iter(task.train_dataloader()))
    inputs, labels = task.on_after_batch_transfer((images[:2], labels[:2]), 0)
    logits = expert(inputs)
    assert logits.shape == (2, classes)
    F.cross_entropy(logits, labels).backward()
    assert all(parameter.grad is not None for parameter in expert.parameters())
