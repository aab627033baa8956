"""Where W&B writes, and whether it can be reached: offline by default, and everything inside the run's folder.

``wandb sync RUN_FOLDER/wandb/offline-run-*`` later brings a run along with its artifacts, which are staged in the same
folder.
"""

import netrc
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import wandb

from coin.errors import CoinError, ConfigurationError

PROJECT = "coin"
_OFFLINE_MODES = ("offline", "dryrun", "disabled")
_OLDER_HOST = "api.wandb.ai"
_CONNECT_SECONDS = 5.0
_JOIN_SECONDS = 6.0


class ConnectionFailedError(CoinError, ConnectionError):
    """W&B was asked to work online and cannot: no key, or no way to the server."""


@contextmanager
def run_environment(folder: Path) -> Iterator[None]:
    """Within this block, W&B works offline and keeps all its files below ``folder/wandb``.

    ``WANDB_MODE`` and ``WANDB_SILENT`` are left alone where the user set them. ``WANDB_DIR`` and ``WANDB_DATA_DIR``
    are not: a run whose artifacts are staged elsewhere does not survive a move to another machine.

    Args:
        folder: The run's folder, such as ``runs/NAME/seed-0``.
    """
    folder = folder.absolute()
    changed = {
        "WANDB_MODE": mode(),
        "WANDB_DIR": str(folder),
        "WANDB_DATA_DIR": str(folder / "wandb"),
    }
    if mode() in _OFFLINE_MODES:
        changed["WANDB_SILENT"] = os.environ.get("WANDB_SILENT", "true")
    before = {name: os.environ.get(name) for name in changed}
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def mode() -> str:
    """Return ``WANDB_MODE`` as the user set it, ``offline`` otherwise.

    Raises:
        ConfigurationError: It is no mode that W&B knows.
    """
    found = os.environ.get("WANDB_MODE") or "offline"
    known = ("online", "shared", *_OFFLINE_MODES)
    if found not in known:
        raise ConfigurationError(f"found WANDB_MODE={found}, expected one of {', '.join(known)}")
    return found


def settings() -> wandb.Settings:
    """Return settings that keep the start quick: no system metrics, no copy of the code, of git or of the console."""
    return wandb.Settings(
        mode=mode(),  # type: ignore[arg-type]
        console="off",
        disable_git=True,
        save_code=False,
        silent=mode() in _OFFLINE_MODES,
        x_disable_stats=True,
        x_save_requirements=False,
    )


def check_connection() -> None:
    """Check, within seconds, that W&B can log online where it is asked to; do nothing offline.

    W&B itself tries for more than a minute before it gives up.

    Raises:
        ConnectionFailedError: There is no API key, or the server (or the proxy on the way) does not answer.
    """
    if mode() in _OFFLINE_MODES:
        return
    # The settings that `wandb login --host` wrote count as well, but they may have been read before the environment.
    found = wandb.setup().settings
    address = os.environ.get("WANDB_BASE_URL") or found.base_url
    url = urlsplit(address)
    host = url.hostname or address
    if not (found.api_key or _has_key([url.netloc, host])):
        raise ConnectionFailedError(
            f"WANDB_MODE={mode()}, but there is no W&B API key for {host}; run `wandb login`, set WANDB_API_KEY, or "
            f"unset WANDB_MODE to log offline and `wandb sync` later"
        )
    proxy = urlsplit(getproxies().get(url.scheme, ""))
    target = (proxy.hostname, proxy.port or 80) if proxy.hostname else (host, url.port or _default_port(url.scheme))
    if problem := _unreachable(*target):
        raise ConnectionFailedError(
            f"WANDB_MODE={mode()}, but {target[0]}:{target[1]} does not answer ({problem}); check the network, or "
            f"unset WANDB_MODE to log offline and `wandb sync` later"
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
