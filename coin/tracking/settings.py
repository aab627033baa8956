"""How W&B works here: offline by default, everything inside the run's folder, and never in an experiment's way."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from coin.errors import CoinWarning, ConfigurationError, first_line

OFFLINE_MODES = ("offline", "dryrun", "disabled")


@contextmanager
def run_environment(folder: Path) -> Iterator[None]:
    """Within this block, W&B works offline unless the user says otherwise, with files in ``folder/wandb``.

    ``WANDB_DIR`` and ``WANDB_DATA_DIR`` are set whatever the user has: a run whose artifacts are staged elsewhere does
    not survive a move to another machine. (No setting of W&B's says where artifacts are staged.)
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    variables = {
        "WANDB_MODE": mode(),
        "WANDB_DIR": str(folder),
        "WANDB_DATA_DIR": str(folder / "wandb"),
    }
    if mode() in OFFLINE_MODES:
        variables["WANDB_SILENT"] = os.environ.get("WANDB_SILENT", "true")
    with patch.dict(os.environ, variables):
        yield


def mode() -> str:
    """Return ``WANDB_MODE`` as the user set it, else ``offline``, ``online`` for an agent of a W&B sweep."""
    return os.environ.get("WANDB_MODE") or ("online" if in_sweep() else "offline")


def in_sweep() -> bool:
    """Return whether an agent of a W&B sweep has started this process, and waits for one run: the evaluation's."""
    return "WANDB_SWEEP_ID" in os.environ


@contextmanager
def logging_only(what: str) -> Iterator[None]:
    """Turn errors of W&B's in this block, which share no base class, into warnings: the results are on disk."""
    try:
        yield
    except Exception as error:
        told = f"W&B did not take {what} ({type(error).__name__}: {first_line(error)}); the files on disk are whole"
        warnings.warn(told, CoinWarning, stacklevel=3)


def check_connection(wanted: str | None = None) -> None:
    """Raise ConfigurationError where W&B is to work online, by default as `mode` says, and has no key or connection.

    W&B itself would try for 100 seconds when the first run starts.
    """
    wanted = wanted or mode()
    if wanted in OFFLINE_MODES:
        return
    import wandb

    try:
        if wandb.run is not None or wandb.login(prompt=False, verify=True):
            return
        problem = "there is no W&B API key; run `wandb login` or set WANDB_API_KEY"
    except wandb.errors.AuthenticationError as error:
        problem = f"its server does not answer or refuses the key ({first_line(error)}); check the network and the key"
    raise ConfigurationError(f"W&B is to work {wanted}, but {problem}, or set WANDB_MODE=offline")
