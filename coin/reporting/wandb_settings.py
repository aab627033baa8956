"""How W&B works here: offline by default, everything inside the run's folder, and never in an experiment's way.

``wandb sync RUN_FOLDER/wandb/offline-run-*`` later brings a run along with its artifacts, which are staged in the same
folder.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import wandb

from coin.errors import CoinWarning, ConfigurationError, first_line

OFFLINE_MODES = ("offline", "dryrun", "disabled")


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
    changed = {
        "WANDB_MODE": wanted,
        "WANDB_DIR": str(folder),
        "WANDB_DATA_DIR": str(folder / "wandb"),
    }
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


def default_project() -> str:
    """Return ``WANDB_PROJECT`` as the user set it, ``coin`` otherwise."""
    return os.environ.get("WANDB_PROJECT") or "coin"


def user_tags() -> list[str]:
    """Return the tags in ``WANDB_TAGS``, which W&B would drop in favour of a run's own."""
    return [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]


def settings() -> wandb.Settings:
    """Return settings that keep the start quick: no system metrics, no copy of the code, of git or of the console."""
    return wandb.Settings(
        mode=mode(),  # type: ignore[arg-type]
        console="off",
        disable_git=True,
        save_code=False,
        silent=mode() in OFFLINE_MODES,
        x_disable_stats=True,
        x_save_requirements=False,
    )


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
