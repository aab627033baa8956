"""A network as a server: batches of stored images in, logits and features out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from coin.data.transform import to_input
from coin.errors import ConfigurationError, ServingError
from coin.networks import pad_head, run_network
from coin.networks.files import open_network


class Reply(NamedTuple):
    """A server's logits ``[B, C]``, and features ``[B, F]``, of width 0 where the decoder reads none."""

    logits: Tensor
    features: Tensor


class Request(NamedTuple):
    """Stored images, uint8 ``[B, 1 or 3, H, W]``, for a network's file; a body with adapters answers as an expert."""

    path: Path
    expert: int
    images: Tensor


def check_finite(reply: Reply) -> Reply:
    """Return a server's reply; raise `ServingError` if it has values that are not finite."""
    if not all(bool(values.isfinite().all()) for values in reply):
        raise ServingError("found a reply that is not finite")
    return reply


class NetworkServer:
    """An expert or a coded model that answers batches of stored images; logits are padded by zeros to `outputs`."""

    def __init__(self, path: Path, outputs: int, features: bool, device: str = "cpu") -> None:
        file = open_network(path)
        if file.config.reads != "images":
            raise ConfigurationError(
                f"found '{path}', which reads {file.config.reads}, expected a network for images"
            )
        # What has no adapters answers as it was evaluated, unpacked.
        is_body = len(file.adapters) > 0 and file.num_classes == outputs
        network = file.module() if is_body else pad_head(file.network, outputs)
        self._image_size = file.config.image_size
        self._network = network.requires_grad_(False).to(device)
        self._device = device
        self._features = features

    @torch.no_grad()
    def __call__(self, images: Tensor, experts: int | Tensor = 0) -> Reply:
        """Return the reply to images, uint8 ``[B, 1 or 3, H, W]``, for an expert or for one an image ``[B]``."""
        inputs = to_input(images.to(self._device), self._image_size)
        run = run_network(self._network, inputs, self._features, experts)
        features = run.features if self._features else run.logits[:, :0]
        return Reply(run.logits.cpu(), features.cpu())


def run_together(
    network_of: Callable[[Path], NetworkServer], requests: Sequence[Request]
) -> list[Reply]:
    """Return the replies to requests, in one pass for each network and shape of its images, for mixed experts."""
    groups: dict[tuple[Path, torch.Size], list[int]] = {}
    for place, request in enumerate(requests):
        kind = request.path, request.images.shape[1:]
        groups.setdefault(kind, []).append(place)
    replies: dict[int, Reply] = {}
    for (path, _), places in groups.items():
        images = [requests[place].images for place in places]
        sizes = torch.tensor([len(each) for each in images])
        experts = torch.tensor([requests[place].expert for place in places])
        together = network_of(path)(torch.cat(images), experts.repeat_interleave(sizes))
        parts = [
            torch.split(values, sizes.tolist()) for values in together
        ]  # of logits, of features
        replies |= dict(zip(places, map(Reply, *parts), strict=True))
    return [replies[place] for place in range(len(requests))]
