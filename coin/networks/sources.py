"""Where networks come from: our own small ones and torchvision's by name, a class of the user's by its import path."""

import difflib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, ClassVar, Protocol
from urllib.error import URLError

import torch
from torch import nn
from torchvision import models

from coin.errors import ConfigurationError, FileError, first_line
from coin.networks.heads import replace_head
from coin.networks.small import SmallResNet, SmallViT
from coin.networks.text_encoder import PRETRAINED, MiniLM, load_pretrained


class Described(Protocol):
    """What a source reads of a `coin.networks.NetworkConfig`."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def image_size(self) -> int: ...  # noqa: D102

    @property
    def weights(self) -> str | None: ...  # noqa: D102

    @property
    def options(self) -> dict[str, Any]: ...  # noqa: D102


class Source(ABC):
    """A family of networks that are built in one way."""

    @abstractmethod
    def check(self, config: Described) -> None:
        """Refuse a name or named weights that the source does not know, with a ConfigurationError."""

    def reads(self, config: Described) -> str:
        """Return what the network reads: ``images`` or ``texts``."""
        return "images"

    @abstractmethod
    def build(self, config: Described, num_classes: int) -> nn.Module:
        """Build a network; what is random is drawn from torch's global generator.

        Raises:
            ConfigurationError: The options do not fit the architecture.
            FileError: Pretrained weights could not be downloaded or read.
        """


class Own(Source):
    """The small networks for tests and quick runs, and an encoder of texts."""

    kinds: ClassVar[dict[str, type[nn.Module]]] = {"small_resnet": SmallResNet, "small_vit": SmallViT, "minilm": MiniLM}
    # The constructor's name for the size of the inputs, where it wants one.
    sizes: ClassVar[dict[str, str]] = {"small_vit": "image_size", "minilm": "length"}

    def check(self, config: Described) -> None:
        """Refuse weights that are none of the encoder's."""
        check_weights(config, list(PRETRAINED) if config.name == "minilm" else [])

    def reads(self, config: Described) -> str:
        """Return ``texts`` of the encoder."""
        return "texts" if config.name == "minilm" else "images"

    def build(self, config: Described, num_classes: int) -> nn.Module:
        """Build a network; see `Source`."""
        options = dict(config.options)
        if config.name in self.sizes:
            options.setdefault(self.sizes[config.name], config.image_size)
        network = constructed(config, self.kinds[config.name], num_classes=num_classes, **options)
        if config.weights is not None:
            assert isinstance(network, MiniLM)
            load_pretrained(network, config.weights)
        return network


class Torchvision(Source):
    """The classification architectures of torchvision."""

    # These return their auxiliary logits beside the main ones while training, unless they are built without; and with
    # pretrained weights they rescale their input, which a file read back must do too, so they always do.
    auxiliary: ClassVar[set[str]] = {"googlenet", "inception_v3"}

    @staticmethod
    def names() -> list[str]:
        """Return all names."""
        return list(models.list_models(module=models))

    def check(self, config: Described) -> None:
        """Refuse other names, and weights that torchvision has not."""
        check_name(
            config.name,
            [*Own.kinds, *self.names()],
            f"{', '.join(Own.kinds)}, a torchvision classifier, timm/NAME, hf/FOLDER_OR_ID or a class's import path",
            "torchvision.models.list_models() lists the others",
        )
        check_weights(config, [entry.name for entry in models.get_model_weights(config.name)])

    def build(self, config: Described, num_classes: int) -> nn.Module:
        """Build a network; see `Source`."""
        options = dict(config.options)
        if config.name in self.auxiliary:
            options.setdefault("transform_input", True)
            if config.weights is None:
                options.setdefault("aux_logits", False)
                options.setdefault("init_weights", True)
        if config.name.startswith("vit_"):
            options.setdefault("image_size", config.image_size)
        elif config.name.startswith("maxvit_"):
            options.setdefault("input_size", (config.image_size, config.image_size))
        if config.weights is None:
            return constructed(config, models.get_model, config.name, weights=None, num_classes=num_classes, **options)
        network = pretrained(
            config,
            lambda: models.get_model(config.name, weights=config.weights, **options),
            f"copy them to {torch.hub.get_dir()}/checkpoints",
        )
        if config.name in self.auxiliary:  # drop the heads that pretrained weights cannot be loaded without
            network.aux_logits = False  # type: ignore[assignment]
            for name in {"aux1", "aux2", "AuxLogits"} & network._modules.keys():
                setattr(network, name, None)
        replace_head(network, num_classes)
        return network


class ImportPath(Source):
    """A class of the user's, by its import path; ``coin`` looks in the working folder too.

    It is constructed with ``num_classes`` and the options, and reads images unless it has an attribute ``reads``.
    """

    def check(self, config: Described) -> None:
        """Refuse what cannot be imported or is no network, and named weights."""
        self._kind(config.name)
        check_weights(config, [])

    def reads(self, config: Described) -> str:
        """Return the class's attribute ``reads``, or ``images``."""
        return str(getattr(self._kind(config.name), "reads", "images"))

    def build(self, config: Described, num_classes: int) -> nn.Module:
        """Build a network; see `Source`."""
        return constructed(config, self._kind(config.name), num_classes=num_classes, **config.options)

    def _kind(self, path: str) -> type[nn.Module]:
        if os.environ.get("COIN_SAFE") == "1":
            raise ConfigurationError(f"found network.name '{path}' with --safe, expected a network by name")
        module, _, name = path.rpartition(".")
        try:
            kind = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigurationError(
                f"found network.name '{path}', expected the import path of a class ({first_line(error)}); check the "
                "spelling, or run where its module is"
            ) from error
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ConfigurationError(f"found network.name '{path}', a {type(kind).__name__}, expected an nn.Module")
        return kind


def check_name(name: str, known: Iterable[str], expected: str, otherwise: str) -> None:
    """Raise a ConfigurationError where a name is not known, which suggests a close one."""
    names = set(known)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else otherwise
        raise ConfigurationError(f"found network.name '{name}', expected {expected}; {hint}")


def check_weights(config: Described, known: list[str]) -> None:
    """Raise a ConfigurationError where weights are named that are not known."""
    if config.weights is None or config.weights in known:
        return
    if not known:
        raise ConfigurationError(
            f"'{config.name}' has no pretrained weights; set network.weights=null, or to a file of its own weights"
        )
    raise ConfigurationError(
        f"found network.weights '{config.weights}', expected null, a file or one of {', '.join(known)} "
        f"for {config.name}"
    )


def constructed(config: Described, builder: Callable[..., Any], *arguments: Any, **options: Any) -> nn.Module:
    """Call a constructor; what does not fit becomes one line."""
    try:
        network = builder(*arguments, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigurationError(
            f"cannot build {config.name} for images of {config.image_size} pixels with options {config.options}: "
            f"{first_line(error)}; change network.image_size or network.options"
        ) from error
    assert isinstance(network, nn.Module)
    return network


def pretrained(config: Described, builder: Callable[[], Any], elsewhere: str) -> nn.Module:
    """Call a constructor that may download weights; `elsewhere` says where to put them by hand."""
    try:
        return constructed(config, builder)
    except (URLError, OSError, RuntimeError) as error:
        if "state_dict" in str(error):
            raise ConfigurationError(
                f"the weights {config.weights} of {config.name} do not fit network.options {config.options}; leave out "
                "the options, or set network.weights=null"
            ) from error
        # torch.hub raises RuntimeError for a wrong checksum, the rest for a network that is not there.
        raise FileError(
            f"cannot download the weights {config.weights} of {config.name} ({first_line(error)}); {elsewhere}, or set "
            "network.weights=null or to a file, or give trained weights as base.checkpoint"
        ) from error
