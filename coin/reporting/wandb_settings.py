"""How W&B works here: offline by default, everything inside the run's folder, and never in an experiment's way.

``wandb sync RUN_FOLDER/wandb/offline-run-*`` later brings a run along with its artifacts, whose files are linked into
the same folder.
"""

import netrc
import os
import socket
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import wandb
from lightning.pytorch.loggers import WandbLogger

from coin.errors import CoinError, CoinWarning, ConfigurationError, first_line

OFFLINE_MODES = ("offline", "dryrun", "disabled")
TAG_LENGTH = 64
"""W&B refuses longer tags, and empty ones."""

_OLDER_HOST = "api.wandb.ai"
_CONNECT_SECONDS = 5.0
_JOIN_SECONDS = 6.0


class ConnectionFailedError(CoinError, ConnectionError):
    """W&B was asked to work online and cannot: no key, or no way to the server."""


@contextmanager
def run_environment(folder: Path, asked: str | None = None) -> Iterator[None]:
    """Within this block, W&B works offline unless it is asked otherwise, and keeps its files below ``folder/wandb``.

    ``WANDB_MODE`` and ``WANDB_SILENT`` are left alone where the user set them. ``WANDB_DIR`` and ``WANDB_DATA_DIR``
    are not: a run whose artifacts are staged elsewhere does not survive a move to another machine.

    Args:
        folder: The run's folder, such as ``runs/NAME/seed-0``.
        asked: The mode that a logger was given; none takes the environment's.
    """
    folder = folder.absolute()
    wanted = asked or mode()
    changed = {"WANDB_MODE": wanted, "WANDB_DIR": str(folder), "WANDB_DATA_DIR": str(folder / "wandb")}
    if wanted in OFFLINE_MODES:
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
    """Return ``WANDB_MODE`` as the user set it; otherwise ``offline``, or ``online`` for an agent of a W&B sweep.

    Raises:
        ConfigurationError: It is none of the modes that an experiment has a use for.
    """
    found = os.environ.get("WANDB_MODE") or ("online" if in_sweep() else "offline")
    known = ("online", "shared", *OFFLINE_MODES)
    if found not in known:
        raise ConfigurationError(f"found WANDB_MODE={found}, expected one of {', '.join(known)}")
    return found


def in_sweep() -> bool:
    """Return whether an agent of a W&B sweep has started this process.

    The agent fixes the identity of the one run that it waits for, and W&B gives it to whatever run this process
    starts. It is kept for the evaluation, whose summary has the numbers that sweeps are judged by.
    """
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def user_tags() -> list[str]:
    """Return the tags in ``WANDB_TAGS``, which W&B would drop in favour of a run's own."""
    return [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]


def logger_mode(logger: WandbLogger) -> str | None:
    """Return the mode that a W&B logger was given, none where it goes by the environment."""
    logger._wandb_init.pop("anonymous", None)  # of which W&B warns even where it is none
    if logger._offline:
        return "offline"
    given: str | None = logger._wandb_init.get("mode")
    return given


@contextmanager
def logging_only(what: str) -> Iterator[None]:
    """Turn whatever goes wrong within this block into a warning: what has been measured lies on the disk already.

    W&B's exceptions share no base class, and those of its dead service are Python's own.

    Args:
        what: What is being logged, for the warning.
    """
    try:
        yield
    except Exception as error:
        warnings.warn(
            f"W&B did not take {what} ({type(error).__name__}: {first_line(error)}); the files on disk are whole",
            CoinWarning,
            stacklevel=3,
        )


def check_connection(asked: str | None = None, *, later: bool = True) -> None:
    """Check, within seconds, that W&B can log online where it is asked to; do nothing offline.

    W&B itself tries for more than a minute.

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
    port = url.port or (80 if url.scheme == "http" else 443)
    target = (proxy.hostname, proxy.port or 80) if proxy.hostname else (host, port)
    if problem := _unreachable(*target):
        raise ConnectionFailedError(
            f"W&B is to work {wanted}, but {target[0]}:{target[1]} does not answer ({problem}); check the network"
            f"{escape}"
        )


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
