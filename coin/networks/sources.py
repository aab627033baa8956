"""Where networks come from: our own small ones and torchvision's by name, a class of the user's by its import path."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torchvision import models

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.core.memory import is_out_of_memory
from coin.errors import ConfigurationError, FileError, first_line
from coin.files.packaged import imported
from coin.networks.heads import replace_head
from coin.networks.small import SmallResNet, SmallViT


@dataclass(frozen=True)
class NetworkSource(ABC):
    """A network of one family; the fields are `NetworkConfig`'s.

    The family's own library checks names and options when the network is built.
    """

    name: str
    image_size: int
    weights: str | None
    options: dict[str, Any]
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    # Whether images come with the channels last in memory, in which depthwise convolutions train at twice the speed. A
    # network of the user's may view its activations in a way that only the usual order allows.
    channels_last: ClassVar[bool] = False
    # Where weights can be put by hand.
    weights_place: ClassVar[str] = (
        "fill the cache of huggingface_hub (HF_HOME) and set HF_HUB_OFFLINE=1"
    )

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

    def check_weights(self) -> None:
        """Refuse weights of a name that the family does not know, with a ConfigurationError."""
        if self.weights is not None:
            raise ConfigurationError(
                f"found network.weights '{self.weights}', expected null for {self.name}"
            )

    def construct(self, builder: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a library's constructor, which may download weights; what goes wrong becomes one line."""
        try:
            return builder(*arguments, **options)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = first_line(error)
            if isinstance(error, OSError) and self.weights is not None:
                raise FileError(
                    f"cannot get the weights {self.weights} of {self.name} ({reason}); {self.weights_place}, or set "
                    "network.weights=null and give trained weights as base.checkpoint"
                ) from error
            raise ConfigurationError(
                f"cannot build {self.name} with image_size {self.image_size}, weights {self.weights} and options "
                f"{self.options}: {reason}; change network.name or these"
            ) from error


class Own(NetworkSource):
    """The small networks for tests and quick runs."""

    kinds: ClassVar[dict[str, type[nn.Module]]] = {
        "small_resnet": SmallResNet,
        "small_vit": SmallViT,
    }
    channels_last = True

    def build(self, num_classes: int) -> nn.Module:
        """Build the network for inputs of its size."""
        options = {**self.options, "num_classes": num_classes}
        if self.name == "small_vit":
            options.setdefault("image_size", self.image_size)
        network: nn.Module = self.construct(self.kinds[self.name], **options)
        return network


class Torchvision(NetworkSource):
    """The classification architectures of torchvision."""

    channels_last = True
    weights_place = f"copy them to {torch.hub.get_dir()}/checkpoints"

    def check_weights(self) -> None:
        """Refuse weights that torchvision does not have for this network."""
        if self.weights is not None:
            known = self.construct(models.get_model_weights, self.name)
            self.construct(known.__getitem__, self.weights)

    def build(self, num_classes: int) -> nn.Module:
        """Build the network without auxiliary heads; with pretrained weights, under a fresh head."""
        options = {**self._usual_options(), **self.options}
        if self.weights is None:
            options["num_classes"] = num_classes
        network: nn.Module = self.construct(
            models.get_model, self.name, weights=self.weights, **options
        )
        for name in _AUXILIARY_HEADS & network._modules.keys():
            setattr(network, name, None)
            network.aux_logits = False  # type: ignore[assignment]
        if self.weights is not None:
            replace_head(network, num_classes)
        return network

    def _usual_options(self) -> dict[str, Any]:
        """Return the constructor's options that depend on the architecture."""
        if self.name.startswith("vit_"):
            return {"image_size": self.image_size}
        if self.name.startswith("maxvit_"):
            return {"input_size": (self.image_size, self.image_size)}
        if self.name in ("googlenet", "inception_v3"):
            # As with pretrained weights, so that a file of them answers alike.
            return {"transform_input": True}
        return {}


_AUXILIARY_HEADS = {"aux1", "aux2", "AuxLogits"}  # of GoogLeNet and Inception v3


class ImportPath(NetworkSource):
    """A class of the user's, by its import path; ``coin`` looks in the working folder too.

    It is constructed with ``num_classes`` and the options, and reads images unless it has an attribute ``reads``.
    """

    @property
    def reads(self) -> str:
        """The class's attribute ``reads``, or ``images``."""
        return str(getattr(self._kind(), "reads", "images"))

    def build(self, num_classes: int) -> nn.Module:
        """Build the network; what its constructor raises keeps its traceback."""
        kind = self._kind()
        options = {**self.options, "num_classes": num_classes}
        try:
            inspect.signature(kind).bind(**options)
        except TypeError as error:
            raise ConfigurationError(
                f"cannot build {self.name} with {options} ({error}); let its __init__ take these"
            ) from error
        return kind(**options)

    def _kind(self) -> type[nn.Module]:
        kind = imported("network.name", self.name, "a class")
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return kind
        raise ConfigurationError(
            f"found network.name '{self.name}', a {type(kind).__name__}, expected an nn.Module"
        )
