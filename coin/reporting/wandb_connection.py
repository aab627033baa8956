"""Whether W&B can be reached, told within seconds: it tries for more than a minute itself."""

import netrc
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import wandb

from coin.errors import CoinError
from coin.reporting.wandb_settings import OFFLINE_MODES, mode

_OLDER_HOST = "api.wandb.ai"
_CONNECT_SECONDS = 5.0
_JOIN_SECONDS = 6.0


class ConnectionFailedError(CoinError, ConnectionError):
    """W&B was asked to work online and cannot: no key, or no way to the server."""


def check_connection(asked: str | None = None, *, later: bool = True) -> None:
    """Check, within seconds, that W&B can log online where it is asked to; do nothing offline.

    Args:
        asked: The mode that a logger was given; none takes the environment's.
        later: Whether the advice is to log offline and to go online later.

    Raises:
        ConnectionFailedError: There is no API key, or the server (or the proxy on the way) does not answer.
    """
    wanted = asked or mode()
    if wanted in OFFLINE_MODES:
        return
    offline = "set WANDB_MODE=offline" if asked is None else "give the logger mode: offline"
    escape = f", or {offline} and `wandb sync` later" if later else ""
    # The settings that `wandb login --host` wrote count as well, but they may have been read before the environment.
    found = wandb.setup().settings
    address = os.environ.get("WANDB_BASE_URL") or found.base_url
    url = urlsplit(address)
    host = url.hostname or address
    if not (found.api_key or _has_key([url.netloc, host])):
        raise ConnectionFailedError(
            f"W&B is to work {wanted}, but there is no W&B API key for {host}; run `wandb login` or set WANDB_API_KEY"
            f"{escape}"
        )
    proxy = urlsplit(getproxies().get(url.scheme, ""))
    target = (proxy.hostname, proxy.port or 80) if proxy.hostname else (host, url.port or _default_port(url.scheme))
    if problem := _unreachable(*target):
        raise ConnectionFailedError(
            f"W&B is to work {wanted}, but {target[0]}:{target[1]} does not answer ({problem}); check the network"
            f"{escape}"
        )


def _default_port(scheme: str) -> int:
    return 80 if scheme == "http" else 443


def _has_key(hosts: Sequence[str]) -> bool:
    """Return whether there is a key in the environment, or in the netrc file for one of these hosts.

    W&B's own hosts share their keys under the older name, so that one is tried last; a key too many is W&B's to
    refuse, while a key overlooked here would lock its owner out.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    given = os.environ.get("NETRC")
    files = [Path(given).expanduser()] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            known = netrc.netrc(str(file))
        except (OSError, netrc.NetrcParseError):
            continue
        if any(known.authenticators(host) for host in (*hosts, _OLDER_HOST)):
            return True
    return False


def _unreachable(host: str, port: int) -> str | None:
    """Return why no connection can be opened within seconds, None where it can.

    The attempt runs in a thread of its own: a time limit on a socket does not cover the look-up of the host's name.
    """
    outcome: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error.strerror or str(error))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_JOIN_SECONDS)
    return outcome[0] if outcome else f"no answer in {_JOIN_SECONDS:g} s"
