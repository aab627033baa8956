"""Low-rank adapters: put into a network's linear layers for its training, merged into the weights after it."""

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from coin.core.batches import clone, twin
from coin.core.choices import check_integer, check_number, is_list_of_names
from coin.errors import ConfigurationError
from coin.files.packaged import how_to_install
from coin.networks.heads import head_name


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: a linear layer's W becomes W + (alpha/rank)·B·A, of which A and B alone are trained.

    B starts at zero, so that training starts from the shared initialisation. Needs the extra ``lora`` (peft).

    Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models* (ICLR 2022).

    Args:
        rank: The number of A's rows and of B's columns.
        alpha: The numerator of the adapters' scale.
        targets: Glob patterns over the names of the linear layers to adapt, such as ``*.mlp.*``; the head is trained
            as a whole. Only layers that run by themselves can be adapted, not those within `nn.MultiheadAttention`.
        dropout: Of the adapters' inputs, in [0, 1).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["*"])
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_integer("lora.rank", self.rank, 1)
        check_number("lora.alpha", self.alpha, low=0.0, strict=True)
        check_number("lora.dropout", self.dropout, low=0.0, high=1.0)
        if not is_list_of_names(self.targets):
            raise ConfigurationError(f"found lora.targets={self.targets!r}, expected a list of glob patterns")


def check_peft() -> None:
    """Raise a ConfigurationError unless peft is installed."""
    if find_spec("peft") is None:
        raise ConfigurationError(f"found lora and no package peft, expected it; {how_to_install('lora')}")


def add_adapters(network: nn.Module, lora: Lora, example: Tensor, *, seed: int = 0) -> None:
    """Put adapters, their A drawn from the seed, into the matching linear layers of a network, in place.

    What requires a gradient among the network's own parameters stays as it is. `example`, an input ``[1, ...]``, shows
    what layers run. Raises ConfigurationError where peft is missing or a pattern matches no layer that can be adapted.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    layers = adaptable_layers(network, example)
    for pattern in lora.targets:
        if not any(fnmatchcase(name, pattern) for name in layers):
            found = f"those that do are {', '.join(layers[:6])}{', …' * (len(layers) > 6)}" if layers else "none does"
            raise ConfigurationError(
                f"found lora.targets pattern '{pattern}', which matches no linear layer of {type(network).__name__} "
                f"that runs by itself and is not its head ({found}); change lora.targets, or leave lora out"
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
        # With a hook, torch's transformer layers take no fast path in evaluation, which reads past the adapters.
        network.get_submodule(name).register_forward_pre_hook(_no_fast_path)


def _no_fast_path(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    pass


@torch.no_grad()
def adaptable_layers(network: nn.Module, example: Tensor) -> list[str]:
    """Return the names of the linear layers that run by themselves on an input ``[1, ...]``, but for the head."""
    network = twin(network).eval()
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    run: set[nn.Module] = set()
    for module in linear.values():
        module.register_forward_pre_hook(lambda module, _: run.add(module))
    network(example)
    return [name for name, module in linear.items() if module in run and name != head_name(network)]


def unwrap(network: nn.Module) -> nn.Module:
    """Return a network, or a copy, as its architecture has it: adapters merged into the weights, all trainable."""
    modules = dict(network.named_modules())
    adapted = [name for name, each in modules.items() if hasattr(each, "lora_A") and hasattr(each, "get_base_layer")]
    if not adapted and all(parameter.requires_grad for parameter in network.parameters()):
        return network
    plain = clone(network)
    for name in adapted:
        layer: Any = plain.get_submodule(name)
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    return plain.requires_grad_(True)
