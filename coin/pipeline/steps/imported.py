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
from coin.files.downloads import folder_contents
from coin.merging.expert_sources import spread
from coin.networks import NetworkConfig, head_name, load_network, save_network
from coin.networks.calling import logits_of
from coin.networks.files import import_checkpoint, import_pretrained
from coin.networks.hub import PREFIX, HuggingFace, local_place
from coin.pipeline.step import Step
from coin.pipeline.steps.train import WriteInitial
from coin.reporting.summary import is_weak

UNRELATED = 0.6
"""Networks of independent random weights are 1 apart, as `spread` counts; two that had one start were at most 0.25."""
_SAMPLES = 100  # that tell whether an expert guesses


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


def place_config(place: str) -> Any:
    """Return a place of Hugging Face's, a folder with the contents of its configuration; None for a file."""
    if not place.startswith(PREFIX):
        return None
    # Which are among the step's files.
    contents = folder_contents(local_place(place), weights=False)
    return {"place": place, "contents": contents} if contents else place


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
    place: str
    task: TaskData

    def run(self) -> None:
        """Write the file."""
        initial = load_network(self.initial.output).network
        if self.place.startswith(PREFIX):
            network = load_network(self.initial.output).network
            import_pretrained(self.network, self.place, network)
        else:
            network = import_checkpoint(self.network, self.task.num_classes, Path(self.place))
        self.tell_accuracy(network)
        self.tell_distance(network, initial)
        made: dict[str, Any] = {
            "made_by": "coin run",
            "source": self.place,
            "task": self.config["task_name"],
            "classes": self.config["classes"],
            "sha256": hashes([*self.config["files"], self.initial.output]),
        }
        save_network(self.output, network, self.network, self.task.num_classes, made)

    @torch.no_grad()
    def tell_accuracy(self, network: nn.Module) -> None:
        """Say how often the expert is right on training samples; warn where that is hardly more often than chance."""
        train = self.task.splits.train
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        stored, labels = train[order[:_SAMPLES]]
        logits = logits_of(network.eval(), to_input(stored, self.task.image_size))  # [P, C]
        accuracy = float((logits.argmax(1) == labels).float().mean())
        chance = 1 / self.task.num_classes
        right = f"right on {accuracy:.1%} of {len(labels)} training samples"
        source = self.network.source
        normalised = ""
        if self.network.reads == "images":
            mean, std = source.normalisation
            normalised = f", images normalised with mean {list(mean)} and std {list(std)}"
        name = self.config["task_name"]
        rank_zero_info(f"expert {name}: {right}{normalised}")
        if not is_weak(accuracy, chance):
            return
        own = ""
        if self.place.startswith(PREFIX) and isinstance(source, HuggingFace):
            named = source.classes(local_place(self.place))  # in the order of its logits
            own = f"its own classes are {', '.join(named[:8])}, "
        warnings.warn(
            f"found the expert '{name}' {right} (chance is {chance:.1%}), expected more; {own}the task's classes are "
            f"{', '.join(self.task.classes[:8])}: check their order, and that it was trained on such inputs",
            CoinWarning,
            stacklevel=2,
        )

    def tell_distance(self, network: nn.Module, initial: nn.Module) -> None:
        """Say how far the expert's body is from the initialisation, and warn where that is another network's."""
        states = [dict(initial.named_parameters()), dict(network.named_parameters())]
        distance = spread(states, [0.5, 0.5], (f"{head_name(network)}.",))
        name = self.config["task_name"]
        rank_zero_info(f"expert {name}: its weights are {distance:.1%} from the initialisation")
        if distance > UNRELATED:
            warnings.warn(
                f"found the expert '{name}' {distance:.0%} of its weights from the initialisation, as "
                "unrelated networks are, expected the one that it was fine-tuned from; give it as base.checkpoint or "
                "network.weights",
                CoinWarning,
                stacklevel=2,
            )
