"""Low-rank adapters: put into a network's linear layers for its training, merged into the weights after it."""

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from coin.errors import ConfigurationError
from coin.networks.heads import head_name

ADAPTER_MARK = ".lora_A."
"""Part of the names of a state dict that holds adapters."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: a linear layer's W becomes W + (alpha/rank)·B·A, of which A and B alone are trained.

    B starts at zero, so that training starts from the shared initialisation. Needs the extra ``lora`` (peft).

    Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models* (ICLR 2022).

    Args:
        rank: The number of A's rows and of B's columns.
        alpha: The numerator of the adapters' scale.
        targets: Glob patterns over the names of the linear layers to adapt, such as ``*.mlp.*``; the head is trained
            as a whole, whatever they say. Only layers that run by themselves can be adapted: attention that packs its
            projections (`nn.MultiheadAttention`) reads their weights past them.
        dropout: Of the adapters' inputs, in [0, 1).

    Raises:
        ConfigurationError: An option is not of its type or out of its range.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["*"])
    dropout: float = 0.0

    def __post_init__(self) -> None:
        numbers = {"alpha": self.alpha, "dropout": self.dropout}
        for name, value in numbers.items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ConfigurationError(f"found lora.{name}={value!r}, expected a number")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ConfigurationError(f"found lora.rank={self.rank!r}, expected a whole number of at least 1")
        if not 0 < self.alpha < float("inf") or not 0 <= self.dropout < 1:
            raise ConfigurationError(
                f"found lora.alpha={self.alpha}, lora.dropout={self.dropout}, expected a number above 0 and one from 0 "
                "to below 1"
            )
        listed = isinstance(self.targets, list) and all(isinstance(pattern, str) for pattern in self.targets)
        if not listed or not self.targets:
            raise ConfigurationError(f"found lora.targets={self.targets!r}, expected a list of glob patterns")


def check_peft() -> None:
    """Raise a ConfigurationError unless peft is installed."""
    if find_spec("peft") is None:
        raise ConfigurationError("found lora and no package peft, expected it; pip install 'coded-coin[lora]'")


def add_adapters(network: nn.Module, lora: Lora, example: Tensor, *, seed: int = 0) -> None:
    """Put adapters into the matching linear layers of a network, in place.

    What requires a gradient among the network's own parameters stays as it is. The global random generator is left as
    found.

    Args:
        network: The network.
        lora: The adapters.
        example: One input ``[1, ...]``, which shows what layers run.
        seed: Of the adapters' A.

    Raises:
        ConfigurationError: peft is missing, or a pattern matches no layer that can be adapted.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    layers = adaptable_layers(network, example)
    for pattern in lora.targets:
        if not any(fnmatchcase(name, pattern) for name in layers):
            found = f"those that do are {', '.join(layers[:6])}{', …' * (len(layers) > 6)}" if layers else "none does"
            raise ConfigurationError(
                f"found lora.targets pattern '{pattern}', which matches no linear layer of {type(network).__name__} "
                f"that runs by itself and is not its head ({found}; packed attention reads its weights past its "
                "layers); change lora.targets, or leave lora out"
            )
    adapted = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in lora.targets)]
    trained = {parameter: parameter.requires_grad for parameter in network.parameters()}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="|".join(re.escape(name) for name in adapted),  # a list would match the ends of names
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, network)
    for parameter, requires_grad in trained.items():
        parameter.requires_grad_(requires_grad)
    for name in adapted:
        # torch's transformer layers take a fast path in evaluation that would read the weights past the adapters;
        # they do not where a layer has a hook.
        network.get_submodule(name).register_forward_pre_hook(_no_fast_path)


def _no_fast_path(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Change nothing."""


@torch.no_grad()
def adaptable_layers(network: nn.Module, example: Tensor) -> list[str]:
    """Return the names of the linear layers that run by themselves on an input ``[1, ...]``, but for the head."""
    head = head_name(network)
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    run: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: run.add(module)) for module in linear.values()]
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return [name for name, module in linear.items() if module in run and name != head]


def plain_network(network: nn.Module) -> nn.Module:
    """Return a network as its architecture has it: adapters merged into the weights, every parameter trainable.

    What is written of an expert, and what is estimated of it, is of this network, whatever was trained of it. It is the
    network itself where it is plain already, else a copy.
    """
    modules = dict(network.named_modules())
    adapted = [name for name, each in modules.items() if hasattr(each, "lora_A") and hasattr(each, "get_base_layer")]
    if not adapted and all(parameter.requires_grad for parameter in network.parameters()):
        return network
    plain = deepcopy(network)
    for name in adapted:
        layer: Any = plain.get_submodule(name)
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    return plain.requires_grad_(True)


def holds_adapters(names: Sequence[str]) -> bool:
    """Return whether tensors of these names are a network's with adapters that are yet to be merged."""
    return any(ADAPTER_MARK in name for name in names)
