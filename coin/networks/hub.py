"""What networks of other packages share: the packages, their hub without a network, their normalisation of images."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor, nn

from coin.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.errors import ConfigurationError

CACHE = "fill the cache of huggingface_hub (HF_HOME)"
"""Where to put by hand what cannot be downloaded."""


def package_of(extra: str, package: str, needed_by: str) -> Any:
    """Import a package of one of our extras; a ConfigurationError says what to install."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigurationError(
            f"found no package {package}, which {needed_by} needs; pip install 'coded-coin[{extra}]'"
        ) from error


@contextmanager
def offline_unless_found() -> Iterator[None]:
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
