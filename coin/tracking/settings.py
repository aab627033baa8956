"""How W&B works here: offline by default, everything inside the run's folder, and never in an experiment's way.

``wandb sync RUN_FOLDER/wandb/offline-run-*`` later brings a run along with its tables and pictures.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from coin.errors import CoinError, CoinWarning, ConfigurationError, first_line

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

OFFLINE_MODES = ("offline", "dryrun", "disabled")
CONFUSION_CHART = "wandb/confusion_matrix/v1"
CONFUSION_COLUMNS = ("Actual", "Predicted", "nPredictions")
"""W&B's chart of a confusion matrix, and the columns of its table."""
TAG_LENGTH = 64
"""W&B refuses longer tags, and empty ones."""


class ConnectionFailedError(CoinError, ConnectionError):
    """W&B was asked to work online and cannot: no key, or no way to the server."""


@contextmanager
def run_environment(folder: Path, asked: str | None = None) -> Iterator[None]:
    """Within this block, W&B works offline unless it is asked otherwise, and keeps its files below ``folder/wandb``.

    ``WANDB_MODE`` and ``WANDB_SILENT`` are left alone where the user set them. ``WANDB_DIR`` and ``WANDB_DATA_DIR``
    are not: a run whose artifacts are staged elsewhere does not survive a move to another machine. `asked` is the mode
    that a logger was given; none takes the environment's.
    """
    folder = folder.absolute()
    wanted = asked or mode()
    changed = {"WANDB_MODE": wanted, "WANDB_DIR": str(folder), "WANDB_DATA_DIR": str(folder / "wandb")}
    if wanted in OFFLINE_MODES:
        changed["WANDB_SILENT"] = os.environ.get("WANDB_SILENT", "true")
    before = {name: os.environ[name] for name in changed if name in os.environ}
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(changed)
    try:
        yield
    finally:
        for name in changed:
            os.environ.pop(name, None)
        os.environ.update(before)


def mode() -> str:
    """Return ``WANDB_MODE`` as the user set it; otherwise ``offline``, or ``online`` for an agent of a W&B sweep.

    Raises ConfigurationError where it is none of the modes that an experiment has a use for.
    """
    found = os.environ.get("WANDB_MODE") or ("online" if in_sweep() else "offline")
    known = ("online", "shared", *OFFLINE_MODES)
    if found not in known:
        raise ConfigurationError(f"found WANDB_MODE={found}, expected one of {', '.join(known)}")
    return found


def in_sweep() -> bool:
    """Return whether an agent of a W&B sweep has started this process.

    It fixes the identity of the one run that it waits for, and W&B gives that to whatever run this process starts. It
    is kept for the evaluation, whose summary has the numbers that sweeps are judged by.
    """
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def user_tags() -> list[str]:
    """Return the tags in ``WANDB_TAGS``, which W&B would drop in favour of a run's own."""
    return [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]


def logger_mode(logger: "WandbLogger") -> str | None:
    """Return the mode that a W&B logger was given, none where it goes by the environment."""
    logger._wandb_init.pop("anonymous", None)  # of which W&B warns even where it is none
    if logger._offline:
        return "offline"
    given: str | None = logger._wandb_init.get("mode")
    return given


@contextmanager
def logging_only(what: str) -> Iterator[None]:
    """Turn logging errors in this block into warnings; the results are already on disk.

    W&B's exceptions share no base class, and those of its dead service are Python's own.
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
    """Log in to W&B where it is asked to work online, which takes a key and an answer; do nothing offline.

    `asked` is the mode that a logger was given, none takes the environment's; `later` advises to go online later.
    Raises ConnectionFailedError where there is no API key, or the server does not answer or refuses it.
    """
    wanted = asked or mode()
    if wanted in OFFLINE_MODES:
        return
    import wandb
    from wandb.errors import AuthenticationError

    if wandb.run is not None:
        return
    offline = "set WANDB_MODE=offline" if asked is None else "give the logger mode: offline"
    try:
        if wandb.login(prompt=False, verify=True):
            return
        problem = "there is no W&B API key; run `wandb login` or set WANDB_API_KEY"
    except AuthenticationError as error:
        problem = f"its server does not answer or refuses the key ({first_line(error)}); check the network and the key"
    escape = f", or {offline} and `wandb sync` later" if later else ""
    raise ConnectionFailedError(f"W&B is to work {wanted}, but {problem}{escape}")
