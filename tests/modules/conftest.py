"""Three experts in files, coded models of two rows, and their tasks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from coin.coding import Answers
from coin.data.tasks import Tasks
from coin.evaluation.scores import Measurement
from coin.modules import DecodingEvaluator
from coin.networks import Compression, features_and_logits, load_network
from coin.pipeline.steps.merge import compress_file
from coin.trainer import Trainer

CLASSES = (3, 2, 3)
PAIR = [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]]


@pytest.fixture
def experts(write_experts: Callable[..., dict[str, str]], tmp_path: Path) -> dict[str, str]:
    """The experts' files, where a run has them."""
    paths = {}
    for task, path in write_experts(CLASSES).items():
        place = tmp_path / "experts" / task / "expert.safetensors"
        place.parent.mkdir()
        paths[task] = str(Path(path).rename(place))
    return paths


@pytest.fixture
def coded(write_coded: Callable[..., list[str]], experts: dict[str, str]) -> list[str]:
    return write_coded(PAIR, experts)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that writes a network's copy in 4 bits, and returns its file."""

    def copy(path: str) -> str:
        place = tmp_path / f"{Path(path).parent.name}-4bit"
        compress_file(Path(path), place, None, Compression(bits=4, base_bits=0))
        return str(place)

    return copy


@pytest.fixture
def copies(experts: dict[str, str], copy_of: Callable[[str], str]) -> list[str]:
    """The files of the experts' copies."""
    return [copy_of(path) for path in experts.values()]


@pytest.fixture
def tasks(tasks_of: Callable[..., Tasks]) -> Tasks:
    return tasks_of(CLASSES)


@pytest.fixture
def measure(make_trainer: Callable[..., Trainer], tasks: Tasks) -> Callable[..., list[Measurement]]:
    """Return a function that runs an evaluator on the tasks and returns what it has measured."""

    def run(evaluator: DecodingEvaluator, data: Any = tasks, **options: Any) -> list[Measurement]:
        make_trainer(**options).test(evaluator, datamodule=data, verbose=False)
        return evaluator.measurements

    return run


@pytest.fixture
def measure_rows(measure: Callable[..., list[Measurement]]) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that runs an evaluator and returns the columns of what it has measured."""

    def run(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        return [each.columns for each in measure(*arguments, **options)]

    return run


@pytest.fixture
def networks_of() -> Callable[[Any], list[nn.Module]]:
    """Return a function that loads the networks of files."""

    def load(paths: Any) -> list[nn.Module]:
        return [load_network(Path(path)).network for path in paths]

    return load


@pytest.fixture
def answers_to(
    experts: dict[str, str], coded: list[str], networks_of: Callable[..., list[nn.Module]]
) -> Callable[[Any], Answers]:
    """Return a function that gives the answers of all experts and coded models to inputs."""
    networks = networks_of([*experts.values(), *coded])

    def answers(inputs: Any) -> Answers:
        with torch.no_grad():
            outputs = [features_and_logits(network, inputs) for network in networks]
        return Answers.of_servers(outputs, len(experts))

    return answers
