"""The classifiers of images and of texts of Hugging Face's transformers."""

import inspect
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coin.errors import ConfigurationError, FileError, first_line
from coin.networks.heads import replace_head
from coin.networks.hub import CACHE, Renormalised, offline_unless_found, package_of
from coin.networks.sources import Source


class HuggingFace(Source):
    """``hf/FOLDER_OR_ID``: what `AutoModelForImageClassification` or `AutoModelForSequenceClassification` makes of it.

    Weights are ``pretrained`` or none. Options replace entries of the configuration. Texts are attended to where their
    tokens are not the configuration's ``pad_token_id``; images are normalised as the folder's
    ``preprocessor_config.json`` says, where there is one, and else as ImageNet's usually are. It is called with a
    tensor and returns logits, and its tensors keep their names.
    """

    @property
    def place(self) -> str:
        """A folder's absolute path, or an ID."""
        place = self.name.removeprefix("hf/")
        return str(Path(place).absolute()) if Path(place).is_dir() else place

    def check(self) -> None:
        """Refuse what is no folder or ID of a classifier, and other weights."""
        self._kind()
        self.check_weights(["pretrained"])

    @property
    def reads(self) -> str:
        """What the model's kind reads."""
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
            with offline_unless_found():
                network = self.download(lambda: auto.from_pretrained(self.place, config=found), CACHE)
            replace_head(network, num_classes)
            network.config.num_labels = num_classes  # type: ignore[union-attr]
        hook = _Images(self, found, network) if reads == "images" else _Texts(self, found)
        network.register_forward_pre_hook(hook, with_kwargs=True)
        network.register_forward_hook(_logits)
        return network

    def _kind(self) -> tuple[str, Any]:
        """Return what the model reads, and the class that makes it."""
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


class _Images:
    """A hook that hands images over by name, in their own normalisation."""

    def __init__(self, source: HuggingFace, found: Any, network: nn.Module) -> None:
        from transformers import ImageProcessingMixin

        try:
            with offline_unless_found():
                processor, _ = ImageProcessingMixin.get_image_processor_dict(source.place)
        except OSError:
            processor = {}
        mean, std = processor.get("image_mean"), processor.get("image_std")
        self.normalise = None if mean is None or std is None else Renormalised(mean, std)
        self.options: dict[str, Any] = {}
        if getattr(found, "image_size", None) not in (None, source.image_size):
            # Where positions were learned for images of one size; convolutions take any.
            interpolates = "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
            self.options = {"interpolate_pos_encoding": True} if interpolates else {}

    def __call__(
        self, network: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        if not inputs:
            return inputs, options
        images = inputs if self.normalise is None else self.normalise(network, inputs)
        return (), {"pixel_values": images[0], **self.options, **options}


class _Texts:
    """A hook that hands tokens over by name, with the mask of those that are no padding."""

    def __init__(self, source: HuggingFace, found: Any) -> None:
        self.padding = getattr(found, "pad_token_id", None) or 0
        longest = getattr(found, "max_position_embeddings", None)
        if longest is not None and source.image_size > longest:
            raise ConfigurationError(
                f"found network.image_size {source.image_size} tokens for {source.name}, expected at most {longest}"
            )

    def __call__(
        self, network: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        if not inputs:
            return inputs, options
        tokens = inputs[0]
        mask = tokens != self.padding
        mask[:, 0] = True  # so that an empty text attends to something
        return (), {"input_ids": tokens, "attention_mask": mask.long(), **options}


def _logits(network: nn.Module, inputs: Any, output: Any) -> Tensor:
    """A hook that returns the logits of a model's output."""
    return output if isinstance(output, Tensor) else output.logits


@cache
def _configuration(place: str, name: str) -> Any:
    transformers = package_of("text", "transformers", f"network.name '{name}'")
    try:
        with offline_unless_found():
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
