"""Checks of experts that were trained elsewhere, before anything runs."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from coin.core.processes import is_rank_zero, rank_zero_info
from coin.data import TaskData, to_input
from coin.errors import CoinWarning, ConfigurationError
from coin.files.atomic import sha256_of
from coin.merging.expert_sources import spread
from coin.networks import NetworkConfig, head_name
from coin.networks.calling import logits_of
from coin.networks.files import import_checkpoint, import_pretrained, initial_network
from coin.networks.hub import PREFIX, HuggingFace, local_place
from coin.reporting.summary import is_weak

UNRELATED = 0.6
"""Networks of independent random weights are 1 apart, as `spread` counts; two that had one start were at most 0.25."""
_CHANCE_SAMPLES = 100  # that tell whether an expert guesses


def check_places(checkpoints: Mapping[str, str]) -> None:
    """Raise ConfigurationError if an expert's file is missing, or two tasks have one file or place."""
    tasks: dict[str, str] = {}  # by the contents of their experts' files
    for task, place in checkpoints.items():
        contents = place
        if not place.startswith(PREFIX):
            path = Path(place)
            if not path.is_file():
                is_hugging_face = (path / "config.json").is_file()
                advice = (
                    f"for a folder of Hugging Face's write hf/{place}"
                    if is_hugging_face
                    else "check the path"
                )
                raise ConfigurationError(
                    f"found no file '{place}', expected an expert's weights; {advice}"
                )
            contents = sha256_of(path)
        if contents in tasks:
            found = f"found one expert for the tasks '{tasks[contents]}' and '{task}', '{place}'"
            raise ConfigurationError(
                f"{found}, expected one of its own for each; check expert.checkpoints"
            )
        tasks[contents] = task


def check_experts(
    checkpoints: Mapping[str, str],
    tasks: Mapping[str, TaskData],
    config: NetworkConfig,
    base_file: Path | None,
    *,
    base_is_trained: bool,
) -> None:
    """Raise CoinError for an expert that does not fit; say how far each is from the base; warn of one that guesses.

    A base that is trained in this run is not there yet: then no distances are told.
    """
    base: nn.Module | None = None
    first: nn.Module | None = None
    for name, place in checkpoints.items():
        task = tasks[name]
        if place.startswith(PREFIX):
            expert = initial_network(config, task.num_classes, base_file)
            import_pretrained(config, place, expert)
        else:
            expert = import_checkpoint(config, task.num_classes, Path(place))
        if not is_rank_zero():
            continue
        tell_accuracy(name, expert, task, _classes_of(place, config), config)
        if base_is_trained:
            continue
        if base is None:
            base = initial_network(config, task.num_classes, base_file)
        tell_distances(name, expert, base, first)
        first = first or expert


def _classes_of(place: str, config: NetworkConfig) -> list[str]:
    """Return the classes that a place of Hugging Face's names, in the order of its logits; none of files."""
    source = config.source
    if place.startswith(PREFIX) and isinstance(source, HuggingFace):
        return source.classes(local_place(place))
    return []


@torch.no_grad()
def tell_accuracy(
    name: str, expert: nn.Module, task: TaskData, classes: list[str], config: NetworkConfig
) -> None:
    """Say how often an expert is right on training samples, and warn where that is hardly more often than chance.

    `classes` are its own.
    """
    train = task.splits.train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    stored, labels = train[order[:_CHANCE_SAMPLES]]
    logits = logits_of(expert.eval(), to_input(stored, task.image_size))  # [P, C]
    accuracy = float((logits.argmax(1) == labels).float().mean())
    chance = 1 / task.num_classes
    normalised = ""
    if config.reads == "images":
        mean, std = config.source.normalisation
        normalised = f", images normalised with mean {list(mean)} and std {list(std)}"
    rank_zero_info(
        f"expert {name}: right on {accuracy:.1%} of {len(labels)} training samples{normalised}"
    )
    if is_weak(accuracy, chance):
        own = f"its own classes are {', '.join(classes[:8])}, " if classes else ""
        warnings.warn(
            f"found the expert '{name}' right on {accuracy:.1%} of {len(labels)} training samples (chance is "
            f"{chance:.1%}), expected more; {own}the task's classes are {', '.join(task.classes[:8])}: check their "
            "order, and that it was trained on such inputs",
            CoinWarning,
            stacklevel=2,
        )


def tell_distances(name: str, expert: nn.Module, base: nn.Module, first: nn.Module | None) -> None:
    """Say how far an expert's body is from the base and from the first expert, and warn where the base is another."""
    from_base = _distance(expert, base)
    from_first = f", {_distance(expert, first):.1%} from the first expert" if first else ""
    rank_zero_info(f"expert {name}: its weights are {from_base:.1%} from the base{from_first}")
    if from_base > UNRELATED:
        warnings.warn(
            f"found the expert '{name}' {from_base:.0%} of its weights from the base, as unrelated networks are, "
            "expected the base that it was fine-tuned from; give it as base.checkpoint or network.weights",
            CoinWarning,
            stacklevel=2,
        )


def _distance(expert: nn.Module, other: nn.Module) -> float:
    head = f"{head_name(expert)}."
    return spread(
        [dict(other.named_parameters()), dict(expert.named_parameters())], [0.5, 0.5], (head,)
    )
