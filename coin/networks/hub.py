"""The Hugging Face hub, and what becomes of its users without a network."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from torch import nn

from coin.networks.sources import Described, pretrained


def pretrained_from_hub(config: Described, builder: Callable[[], Any]) -> nn.Module:
    """Call a constructor that may download weights from the hub; see `pretrained`."""
    with offline_unless_found():
        return pretrained(config, builder, "fill the cache of huggingface_hub (HF_HOME)")


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
