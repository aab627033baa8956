"""Where networks come from: our own small ones and torchvision's by name, a class of the user's by its import path."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torchvision import models

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.core.choices import did_you_mean
from coin.core.memory import is_out_of_memory
from coin.errors import ConfigurationError, FileError, first_line
from coin.files.packaged import imported
from coin.networks.heads import replace_head
from coin.networks.small import SmallResNet, SmallViT


@dataclass(frozen=True)
class NetworkSource(ABC):
    """A network of one family; the fields are `NetworkConfig`'s."""

    name: str
    image_size: int
    weights: str | None
    options: dict[str, Any]
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    # Whether images come with the channels last in memory, in which depthwise convolutions train at twice the speed. A
    # network of the user's may view its activations in a way that only the usual order allows.
    channels_last: ClassVar[bool] = False

    @abstractmethod
    def check(self) -> None:
        """Refuse a name or weights that the family does not know, with a ConfigurationError."""

    @property
    def reads(self) -> str:
        """What the network reads: ``images`` or ``texts``."""
        return "images"

    @property
    def usual_normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """The mean and deviation of images in [0, 1] that the family's networks were trained with: ImageNet's."""
        return IMAGENET_MEAN, IMAGENET_STD

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """The mean and deviation that images are normalised with."""
        if self.mean is None or self.std is None:
            return self.usual_normalisation
        return self.mean, self.std

    def check_vocabulary(self, count: int) -> None:  # noqa: B027 (most have none)
        """Refuse texts of so many different tokens, with a ConfigurationError, where the network has others."""

    @abstractmethod
    def build(self, num_classes: int) -> nn.Module:
        """Build the network; what is random is drawn from torch's global generator."""

    def check_name(self, known: list[str], expected: str, advice: str) -> None:
        """Refuse a name that is not known; `advice` says where the known ones are listed."""
        found = f"found network.name '{self.name}'"
        if (Path(self.name) / "config.json").is_file():
            expected = f"hf/ before it; write hf/{self.name}"
            raise ConfigurationError(f"{found}, a folder of Hugging Face's, expected {expected}")
        if self.name not in known:
            raise ConfigurationError(
                f"{found}{did_you_mean(self.name, known)}, expected {expected}; {advice}"
            )

    def check_weights(self, known: list[str]) -> None:
        """Refuse named weights that are not known."""
        if self.weights not in (None, *known):
            expected = ", ".join([*known, "null"])
            raise ConfigurationError(
                f"found network.weights '{self.weights}', expected {expected} for {self.name}"
            )

    def construct(self, builder: Callable[..., Any], *arguments: Any, **options: Any) -> nn.Module:
        """Call a constructor; what does not fit becomes one line."""
        try:
            network: nn.Module = builder(*arguments, **options)
        except Exception as error:
            # A download has its own line, and not every network can be built on the meta device.
            if is_out_of_memory(error) or isinstance(error, OSError | NotImplementedError):
                raise
            inputs = f"images of size {self.image_size}" if self.reads == "images" else self.reads
            found = f"cannot build {self.name} for {inputs} with options {self.options}"
            raise ConfigurationError(
                f"{found}: {first_line(error)}; change network.image_size or these"
            ) from error
        return network

    def download(self, builder: Callable[[], Any], elsewhere: str) -> nn.Module:
        """Call a constructor that may download weights; `elsewhere` says where to put them by hand."""
        try:
            return self.construct(builder)
        except OSError as error:
            reason = first_line(error)
            found = f"cannot download the weights {self.weights} of {self.name} ({reason})"
            advice = "or set network.weights=null and give trained weights as base.checkpoint"
            raise FileError(f"{found}; {elsewhere}, {advice}") from error


class Own(NetworkSource):
    """The small networks for tests and quick runs."""

    kinds: ClassVar[dict[str, type[nn.Module]]] = {
        "small_resnet": SmallResNet,
        "small_vit": SmallViT,
    }
    channels_last = True

    def check(self) -> None:
        """Refuse named weights: there are none."""
        self.check_weights([])

    def build(self, num_classes: int) -> nn.Module:
        """Build the network for inputs of its size."""
        options = dict(self.options)
        if self.name == "small_vit":
            options.setdefault("image_size", self.image_size)
        return self.construct(self.kinds[self.name], num_classes=num_classes, **options)


class Torchvision(NetworkSource):
    """The classification architectures of torchvision."""

    channels_last = True

    def check(self) -> None:
        """Refuse a name or weights that torchvision has not, and networks with auxiliary heads."""
        auxiliary = {"googlenet", "inception_v3"}  # timm has inception_v3 without
        self.check_name(
            [*Own.kinds, *sorted(set(models.list_models(module=models)) - auxiliary)],
            f"{', '.join(Own.kinds)}, a torchvision classifier, timm/NAME, hf/FOLDER_OR_ID or a class's import path",
            "torchvision.models.list_models() lists the others",
        )
        self.check_weights([entry.name for entry in models.get_model_weights(self.name)])

    def build(self, num_classes: int) -> nn.Module:
        """Build the network; with pretrained weights, under a fresh head."""
        options = dict(self.options)
        if self.name.startswith("vit_"):
            options.setdefault("image_size", self.image_size)
        elif self.name.startswith("maxvit_"):
            options.setdefault("input_size", (self.image_size, self.image_size))
        if self.weights is None:
            return self.construct(
                models.get_model, self.name, weights=None, num_classes=num_classes, **options
            )
        network = self.download(
            lambda: models.get_model(self.name, weights=self.weights, **options),
            f"copy them to {torch.hub.get_dir()}/checkpoints",
        )
        replace_head(network, num_classes)
        return network


class ImportPath(NetworkSource):
    """A class of the user's, by its import path; ``coin`` looks in the working folder too.

    It is constructed with ``num_classes`` and the options, and reads images unless it has an attribute ``reads``.
    """

    def check(self) -> None:
        """Refuse what cannot be imported or is no network, and named weights."""
        self._kind()
        self.check_weights([])

    @property
    def reads(self) -> str:
        """The class's attribute ``reads``, or ``images``."""
        return str(getattr(self._kind(), "reads", "images"))

    def build(self, num_classes: int) -> nn.Module:
        """Build the network; what its constructor raises keeps its traceback."""
        kind = self._kind()
        try:
            inspect.signature(kind).bind(num_classes=num_classes, **self.options)
        except TypeError as error:
            found = f"cannot build {self.name} with num_classes and network.options {self.options} ({error})"
            raise ConfigurationError(f"{found}; let its __init__ take these") from error
        return kind(num_classes=num_classes, **self.options)

    def _kind(self) -> type[nn.Module]:
        kind = imported("network.name", self.name, "a class")
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return kind
        raise ConfigurationError(
            f"found network.name '{self.name}', a {type(kind).__name__}, expected an nn.Module"
        )
