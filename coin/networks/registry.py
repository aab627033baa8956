"""Networks by name: our own small ones and every classification architecture of torchvision."""

import difflib
from dataclasses import dataclass, field
from typing import Any
from urllib.error import URLError

import torch
from torch import nn
from torchvision import models

from coin.errors import ConfigurationError, FileError, first_line
from coin.networks.heads import head_name, replace_head
from coin.networks.small import SmallResNet, SmallViT
from coin.networks.text_encoder import PRETRAINED, MiniLM, load_pretrained

_OWN = {"small_resnet": SmallResNet, "small_vit": SmallViT, "minilm": MiniLM}
# The constructor's name for the size of the inputs, where it wants one.
_SIZES = {"small_vit": "image_size", "minilm": "length"}
# These return their auxiliary logits beside the main ones while training, unless they are built without; and with
# pretrained weights they rescale their input, which a file read back must do too, so they always do.
_AUXILIARY = {"googlenet", "inception_v3"}


@dataclass(frozen=True)
class NetworkConfig:
    """Which network an experiment uses.

    Args:
        name: ``small_resnet``, ``small_vit`` or a classification architecture of torchvision (``resnet50``,
            ``vit_b_16``, …); ``minilm`` for texts.
        image_size: Height and width of the input images, in pixels; for texts, their number of tokens.
        weights: torchvision's name of pretrained weights, such as ``IMAGENET1K_V2``, or ``ALL_MINILM_L6_V2`` for
            ``minilm``; null for random ones.
        options: Further arguments of the network's constructor.
    """

    name: str = "resnet50"
    image_size: int = 32
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in network_names():
            close = difflib.get_close_matches(self.name, network_names(), n=1)
            hint = f"; did you mean '{close[0]}'?" if close else "; torchvision.models.list_models() lists the others"
            raise ConfigurationError(
                f"found network.name '{self.name}', expected {', '.join(_OWN)} or a torchvision classifier{hint}"
            )
        if self.image_size < 1:
            raise ConfigurationError(f"found network.image_size {self.image_size}, expected at least 1 pixel")
        if self.weights is not None:
            known = list(PRETRAINED) if self.name == "minilm" else []
            if self.name not in _OWN:
                known = [entry.name for entry in models.get_model_weights(self.name)]
            if not known:
                raise ConfigurationError(f"'{self.name}' has no pretrained weights; set network.weights=null")
            if self.weights not in known:
                raise ConfigurationError(
                    f"found network.weights '{self.weights}', expected null or one of {', '.join(known)} "
                    f"for {self.name}"
                )

    @property
    def reads(self) -> str:
        """What the network reads: ``images`` or ``texts``."""
        return "texts" if self.name == "minilm" else "images"

    def check_content(self, content: str) -> None:
        """Refuse data that the network does not read, ``images`` or ``texts``, with a ConfigurationError."""
        if content != self.reads:
            raise ConfigurationError(
                f"found a task of {content} for the network '{self.name}', expected {self.reads}; change the task or "
                "network.name (minilm reads texts, all others images)"
            )


def network_names() -> list[str]:
    """Return every name that `build_network` knows."""
    return [*_OWN, *models.list_models(module=models)]


def build_network(config: NetworkConfig, num_classes: int, *, seed: int = 0) -> nn.Module:
    """Build a network with a head of `num_classes` outputs.

    The same arguments give the same weights, whatever the state of the global random generators, which are left as
    found.

    Args:
        config: The network.
        num_classes: The number of logits.
        seed: Of the random initialisation: the whole network's, or with pretrained weights the head's.

    Raises:
        ConfigurationError: The options do not fit the architecture.
        FileError: Pretrained weights could not be downloaded or read.
    """
    if num_classes < 1:
        raise ConfigurationError(f"found {num_classes} classes, expected at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = dict(config.options)
        if config.name in _OWN:
            if config.name in _SIZES:
                options.setdefault(_SIZES[config.name], config.image_size)
            network = _constructed(config, _OWN[config.name], num_classes=num_classes, **options)
            if config.weights is not None:
                assert isinstance(network, MiniLM)
                load_pretrained(network, config.weights)
            return network
        if config.name in _AUXILIARY:
            options.setdefault("transform_input", True)
            if config.weights is None:
                options.setdefault("aux_logits", False)
                options.setdefault("init_weights", True)
        if config.name.startswith("vit_"):
            options.setdefault("image_size", config.image_size)
        elif config.name.startswith("maxvit_"):
            options.setdefault("input_size", (config.image_size, config.image_size))
        if config.weights is None:
            network = _constructed(
                config, models.get_model, config.name, weights=None, num_classes=num_classes, **options
            )
        else:
            network = _pretrained(config, options)
            if config.name in _AUXILIARY:  # drop the heads that pretrained weights cannot be loaded without
                network.aux_logits = False  # type: ignore[assignment]
                for name in {"aux1", "aux2", "AuxLogits"} & network._modules.keys():
                    setattr(network, name, None)
            replace_head(network, num_classes)
    return network


def _pretrained(config: NetworkConfig, options: dict[str, Any]) -> nn.Module:
    try:
        return _constructed(config, models.get_model, config.name, weights=config.weights, **options)
    except (URLError, OSError, RuntimeError) as error:
        if "state_dict" in str(error):
            raise ConfigurationError(
                f"the weights {config.weights} of {config.name} do not fit network.options {config.options}; leave out "
                "the options, or set network.weights=null"
            ) from error
        # torch.hub raises RuntimeError for a wrong checksum, the rest for a network that is not there.
        raise FileError(
            f"cannot download the weights {config.weights} of {config.name} ({first_line(error)}); "
            f"copy them to {torch.hub.get_dir()}/checkpoints, or set network.weights=null, or give trained weights as "
            "base.checkpoint"
        ) from error


def _constructed(config: NetworkConfig, builder: Any, *arguments: Any, **options: Any) -> nn.Module:
    try:
        network = builder(*arguments, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigurationError(
            f"cannot build {config.name} for images of {config.image_size} pixels with options {config.options}: "
            f"{first_line(error)}; change network.image_size or network.options"
        ) from error
    assert isinstance(network, nn.Module)
    head_name(network)
    return network
