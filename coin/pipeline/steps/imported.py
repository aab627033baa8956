"""The step to an expert that was trained elsewhere, and what is said of it before anything is trained."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from coin.core.processes import rank_zero_info
from coin.data import TaskData, to_input
from coin.errors import CoinWarning, ConfigurationError
from coin.files.atomic import hashes, sha256_of
from coin.files.downloads import folder_contents, hub_weights
from coin.merging.expert_sources import spread
from coin.networks import NetworkConfig, head_name, load_network, save_network
from coin.networks.calling import logits_of
from coin.networks.files import import_checkpoint, import_pretrained
from coin.networks.hub import PREFIX, local_place
from coin.pipeline.step import Step
from coin.pipeline.steps.train import WriteInitial
from coin.reporting.summary import is_weak

UNRELATED = 0.6
"""Networks of independent random weights are 1 apart, as `spread` counts; two that had one start were at most 0.25."""
_SAMPLES = 100  # that tell whether an expert guesses


def check_places(checkpoints: Mapping[str, str]) -> None:
    """Raise ConfigurationError if two tasks have one expert, FileError if a file is missing."""
    tasks: dict[str, str] = {}  # by the contents of their experts' files
    for task, place in checkpoints.items():
        contents = place if place.startswith(PREFIX) else sha256_of(Path(place))
        if contents in tasks:
            found = f"found one expert for the tasks '{tasks[contents]}' and '{task}', '{place}'"
            raise ConfigurationError(
                f"{found}, expected one of its own for each; check expert.checkpoints"
            )
        tasks[contents] = task


def place_config(place: str) -> dict[str, Any]:
    """Return what decides what is read of a place: a file, or of Hugging Face's also the configuration of a folder."""
    if not place.startswith(PREFIX):
        return {"files": [Path(place)]}
    local = local_place(place)
    return {
        "place": place,
        "contents": folder_contents(local, weights=False),
        "files": hub_weights(local),
    }


@dataclass(frozen=True, eq=False, kw_only=True)
class ImportExpert(Step):
    """Writes an expert from a user's file of weights, or from a folder or ID of Hugging Face's (``hf/…``).

    It says how often the expert is right, and how far it is from the initialisation, and warns where one of them hints
    at a mistake.
    """

    file: ClassVar[str] = "expert.safetensors"
    remote: ClassVar[bool] = False
    doing: ClassVar[str] = "importing"

    network: NetworkConfig
    initial: WriteInitial
    source: str

    def run(self) -> None:
        """Write the file."""
        ((name, task),) = self.tasks.items()
        initial = load_network(self.initial.output).network
        if self.source.startswith(PREFIX):
            network = load_network(self.initial.output).network
            import_pretrained(self.network, self.source, network)
        else:
            network = import_checkpoint(self.network, task.num_classes, Path(self.source))
        tell_accuracy(name, task, network, self.network)
        tell_distance(name, network, initial)
        made: dict[str, Any] = {
            "made_by": "coin run",
            "source": self.source,
            "task": name,
            "classes": self.config["classes"],
            "sha256": hashes([*self.config["files"], self.initial.output]),
        }
        save_network(self.output, network, self.network, task.num_classes, made)


@torch.no_grad()
def tell_accuracy(name: str, task: TaskData, network: nn.Module, config: NetworkConfig) -> None:
    """Say how often an expert is right on training samples; warn where that is hardly more often than chance."""
    train = task.splits.train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    stored, labels = train[order[:_SAMPLES]]
    logits = logits_of(network.eval(), to_input(stored, task.image_size))  # [P, C]
    accuracy = float((logits.argmax(1) == labels).float().mean())
    chance = 1 / task.num_classes
    right = f"right on {accuracy:.1%} of {len(labels)} training samples"
    normalised = ""
    if config.reads == "images":
        mean, std = config.source.normalisation
        normalised = f", images normalised with mean {list(mean)} and std {list(std)}"
    rank_zero_info(f"expert {name}: {right}{normalised}")
    if is_weak(accuracy, chance):
        warnings.warn(
            f"found the expert '{name}' {right} (chance is {chance:.1%}), expected more; the task's classes are "
            f"{', '.join(task.classes[:8])}: check their order, and that it was trained on such inputs",
            CoinWarning,
            stacklevel=2,
        )


def tell_distance(name: str, network: nn.Module, initial: nn.Module) -> None:
    """Say how far an expert's body is from the initialisation, and warn where that is another network's."""
    states = [dict(initial.named_parameters()), dict(network.named_parameters())]
    distance = spread(states, [0.5, 0.5], (f"{head_name(network)}.",))
    rank_zero_info(f"expert {name}: its weights are {distance:.1%} from the initialisation")
    if distance > UNRELATED:
        warnings.warn(
            f"found the expert '{name}' {distance:.0%} of its weights from the initialisation, as "
            "unrelated networks are, expected the one that it was fine-tuned from; give it as base.checkpoint or "
            "network.weights",
            CoinWarning,
            stacklevel=2,
        )
