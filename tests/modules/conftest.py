"""Three experts in files, coded models of two rows, and their tasks."""

from pathlib import Path

import pytest
import torch

from coin.coding import Answers
from coin.networks import Compression, features_and_logits, load_network
from coin.pipeline.steps.merge import compress_file

CLASSES = (3, 2, 3)
PAIR = [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]]


@pytest.fixture
def experts(write_experts, tmp_path):
    """The experts' files, where a run has them."""
    paths = {}
    for task, path in write_experts(CLASSES).items():
        place = tmp_path / "experts" / task / "expert.safetensors"
        place.parent.mkdir()
        paths[task] = str(Path(path).rename(place))
    return paths


@pytest.fixture
def coded(write_coded, experts):
    return write_coded(PAIR, experts)


@pytest.fixture
def copy_of(tmp_path):
    """Return a function that writes a network's copy in 4 bits, and returns its file."""

    def copy(path):
        place = tmp_path / f"{Path(path).parent.name}-4bit"
        compress_file(Path(path), place, None, Compression(bits=4, base_bits=0))
        return str(place)

    return copy


@pytest.fixture
def copies(experts, copy_of):
    """The files of the experts' copies."""
    return [copy_of(path) for path in experts.values()]


@pytest.fixture
def tasks(tasks_of):
    return tasks_of(CLASSES)


@pytest.fixture
def measure(make_trainer, tasks):
    """Return a function that runs an evaluator on the tasks and returns what it has measured."""

    def run(evaluator, data=tasks, **options):
        make_trainer(**options).test(evaluator, datamodule=data, verbose=False)
        return evaluator.measurements

    return run


@pytest.fixture
def measure_rows(measure):
    """Return a function that runs an evaluator and returns the columns of what it has measured."""

    def run(*arguments, **options):
        return [each.columns for each in measure(*arguments, **options)]

    return run


@pytest.fixture
def networks_of():
    """Return a function that loads the networks of files."""

    def load(paths):
        return [load_network(Path(path)).network for path in paths]

    return load


@pytest.fixture
def answers_to(experts, coded, networks_of):
    """Return a function that gives the answers of all experts and coded models to inputs."""
    networks = networks_of([*experts.values(), *coded])

    @torch.no_grad()
    def answers(inputs):
        outputs = [features_and_logits(network, inputs) for network in networks]
        return Answers.of_servers(outputs, len(experts))

    return answers
