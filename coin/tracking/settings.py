"""How W&B works here: offline by default, everything inside the run's folder, and never in an experiment's way."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger

from coin.errors import CoinWarning, ConfigurationError, first_line

OFFLINE_MODES = ("offline", "dryrun", "disabled")
CONFUSION_CHART = "wandb/confusion_matrix/v1"  # W&B's own, of a table with these columns
CONFUSION_COLUMNS = ("Actual", "Predicted", "nPredictions")
TAG_LENGTH = 64  # W&B refuses longer tags, and empty ones


@contextmanager
def run_environment(folder: Path, asked: str | None = None) -> Iterator[None]:
    """Within this block, W&B works offline unless the user or a logger asks otherwise, with files in ``folder/wandb``.

    ``WANDB_DIR`` and ``WANDB_DATA_DIR`` are set whatever the user has: a run whose artifacts are staged elsewhere does
    not survive a move to another machine.
    """
    folder, wanted = folder.absolute(), asked or mode()
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
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def mode() -> str:
    """Return ``WANDB_MODE`` as the user set it, else ``offline``, ``online`` for an agent of a W&B sweep."""
    found = os.environ.get("WANDB_MODE") or ("online" if in_sweep() else "offline")
    if found not in (known := ("online", "shared", *OFFLINE_MODES)):
        raise ConfigurationError(f"found WANDB_MODE={found}, expected one of {', '.join(known)}")
    return found


def in_sweep() -> bool:
    """Return whether an agent of a W&B sweep has started this process, and waits for one run: the evaluation's."""
    return "WANDB_SWEEP_ID" in os.environ


def logger_mode(logger: WandbLogger) -> str | None:
    """Return the mode that a W&B logger was given, none where it goes by the environment."""
    logger._wandb_init.pop("anonymous", None)  # of which W&B warns even where it is none
    return "offline" if logger._offline else logger._wandb_init.get("mode")


@contextmanager
def logging_only(what: str) -> Iterator[None]:
    """Turn errors of W&B's in this block, which share no base class, into warnings: the results are on disk."""
    try:
        yield
    except Exception as error:
        told = f"W&B did not take {what} ({type(error).__name__}: {first_line(error)}); the files on disk are whole"
        warnings.warn(told, CoinWarning, stacklevel=3)


def check_connection(asked: str | None = None, *, later: bool = True) -> None:
    """Raise ConfigurationError where W&B is to work online, and there is no key or its server refuses.

    `asked` is the mode that a logger was given, none takes the environment's; `later` advises to go online later.
    """
    if (wanted := asked or mode()) in OFFLINE_MODES:
        return
    import wandb

    try:
        if wandb.run is not None or wandb.login(prompt=False, verify=True):
            return
        problem = "there is no W&B API key; run `wandb login` or set WANDB_API_KEY"
    except wandb.errors.AuthenticationError as error:
        problem = f"its server does not answer or refuses the key ({first_line(error)}); check the network and the key"
    offline = "set WANDB_MODE=offline" if asked is None else "give the logger mode: offline"
    escape = f", or {offline} and `wandb sync` later" if later else ""
    raise ConfigurationError(f"W&B is to work {wanted}, but {problem}{escape}")
