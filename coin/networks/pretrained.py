"""Experts from Hugging Face's folders and identifiers, and heads that are computed from class names."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from coin.errors import ConfigurationError
from coin.networks.files import load_network
from coin.networks.heads import head_name, is_frozen
from coin.networks.hub import HuggingFace, local_place
from coin.networks.registry import NetworkConfig

ZeroShot = tuple[Sequence[str], Sequence[str]]
"""A task's prompts and class names, of which a zero-shot head is computed."""


def check_heads(config: NetworkConfig, zero_shot: bool, task: str) -> None:
    """Refuse a task with a zero-shot head for a network that trains its own, and the reverse; a ConfigurationError."""
    if zero_shot and not config.source.zero_shot:
        raise ConfigurationError(
            f"found head.zero_shot for the task '{task}' and the network '{config.name}', whose head is trained, "
            "expected a CLIP with network.options.head=zero_shot; set it, or leave the task's head out"
        )
    if config.source.zero_shot and not zero_shot:
        raise ConfigurationError(
            f"found network.options.head zero_shot and the task '{task}' without a head, expected prompts; give it "
            "head: {zero_shot: {prompts: ['a photo of a {}.'], classes: [...]}}"
        )


@torch.no_grad()
def fill_head(network: nn.Module, config: NetworkConfig, zero_shot: ZeroShot | None, task: str = "task") -> None:
    """Compute a task's zero-shot head and write it into a network that has such a head; raises as `check_heads`."""
    check_heads(config, zero_shot is not None, task)
    if zero_shot is None or not is_frozen(network):
        return
    source = config.source
    assert isinstance(source, HuggingFace)
    head, weight = source.zero_shot_head(*zero_shot), network.get_submodule(head_name(network)).get_parameter("weight")
    if head.shape != weight.shape:
        raise ConfigurationError(
            f"found a zero-shot head {list(head.shape)} for the task '{task}', expected {list(weight.shape)}; give "
            "one name for each class"
        )
    weight.copy_(head)


def import_pretrained(
    config: NetworkConfig, place: str, initial: Path, zero_shot: ZeroShot | None, task: str
) -> nn.Module:
    """Return a task's expert with the weights of Hugging Face's folder or ID, ``hf/PLACE``.

    Args:
        config: The network, one of Hugging Face's.
        place: The folder or ID, with its prefix.
        initial: The shared initialisation's file, whose projection is kept where a CLIP tower was saved without.
        zero_shot: The task's prompts and classes, of a network with a zero-shot head.
        task: The task's name, for errors.

    Raises:
        ConfigurationError: The network is none of Hugging Face's, or the head does not fit the task.
        FileError: The weights cannot be read.
        StateError: They are of another architecture.
    """
    source = config.source
    if not isinstance(source, HuggingFace):
        raise ConfigurationError(
            f"found the expert '{place}' for the network '{config.name}', expected a network of Hugging Face's (hf/…); "
            "give a file of weights, or change network.name"
        )
    network = load_network(initial).network
    source.load(network, local_place(place))
    fill_head(network, config, zero_shot, task)
    return network
