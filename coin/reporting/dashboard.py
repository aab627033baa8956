"""``coin dashboard``: makes the workspace of a project on W&B's server from what the project's runs have logged."""

import os
from collections.abc import Iterator
from itertools import islice

import wandb

from coin.errors import CoinError, ConfigurationError, first_line
from coin.reporting.wandb_connection import check_connection
from coin.reporting.wandb_settings import OFFLINE_MODES
from coin.reporting.wandb_workspace import Logged, workspace, workspaces

_RUNS = 200
"""How many evaluations are looked at, the latest first: enough for every name that an experiment logs."""


def dashboard(project: str, group: str | None = None, name: str | None = None) -> str:
    """Make a W&B workspace for the experiments of a project, online.

    It shows what the project's evaluations have logged so far; after an experiment with other decoders or tasks, make
    another.

    Args:
        project: ``ENTITY/PROJECT``, or ``PROJECT`` of your default entity.
        group: The one experiment to show; none shows all.
        name: What the workspace is called; none calls it after the experiment, or ``coin``.

    Returns:
        The workspace's address.

    Raises:
        ConfigurationError: ``WANDB_MODE`` is offline, ``wandb-workspaces`` is not installed, or the project is missing
            or has no run of a single method.
        ConnectionFailedError: There is no API key, or the server does not answer.
    """
    parts = project.split("/")
    if len(parts) > 2 or not all(parts):
        raise ConfigurationError(f"found project '{project}', expected ENTITY/PROJECT or PROJECT")
    mode = os.environ.get("WANDB_MODE")
    if mode in OFFLINE_MODES:
        raise ConfigurationError(
            f"found WANDB_MODE={mode}, but a dashboard lives on W&B's server; unset it for coin dashboard, or write "
            "the report of a folder with coin report"
        )
    workspaces()
    check_connection("online", later=False)
    try:
        entity, called = parts if len(parts) == 2 else (wandb.Api().default_entity, parts[0])
        logged = Logged.of(_evaluations(f"{entity}/{called}", group))
        made = workspace(str(entity), called, logged, group, name or group or "coin")
        made.save()
        address: str = made.url
    except CoinError:
        raise
    except Exception as error:  # W&B's own exceptions share no base class
        raise ConfigurationError(
            f"W&B did not make a dashboard for '{project}' ({first_line(error)}); check the names, and that "
            "runs of coin run were logged online or brought there by `wandb sync`"
        ) from error
    return address


def _evaluations(path: str, group: str | None) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the tags and the names in the summary of a project's latest evaluations."""
    filters = {"jobType": "evaluate", **({} if group is None else {"group": group})}
    for run in islice(wandb.Api().runs(path, filters=filters, order="-created_at"), _RUNS):
        yield list(run.tags), list(run.summary.keys())
