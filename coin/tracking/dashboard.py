"""``coin dashboard``: a workspace on W&B's server, made by ``wandb-workspaces`` from what evaluations have logged."""

import os
from collections.abc import Collection
from typing import Any

import wandb

from coin.errors import ConfigurationError
from coin.files.packaged import extra_module
from coin.tracking.settings import OFFLINE_MODES, check_connection

_LATEST = 200  # runs, enough for the names of all methods and decoders


def dashboard(project: str, group: str | None = None, name: str | None = None) -> str:
    """Make a W&B workspace for the experiments of a project, online.

    Args:
        project: ``ENTITY/PROJECT``, or ``PROJECT`` of your default entity.
        group: The one experiment to show; none shows all.
        name: What the workspace is called; none calls it after the experiment, or ``coin``.

    Returns its address. Raises ConfigurationError where that cannot be: offline, or there is no run of an evaluation.
    """
    entity, _, called = project.rpartition("/")
    mode = os.environ.get("WANDB_MODE")
    if mode in OFFLINE_MODES:
        raise ConfigurationError(
            f"found WANDB_MODE={mode}, but a dashboard lives on W&B's server; unset it for coin dashboard, "
            "or write a report with coin report"
        )
    extra_module("wandb_workspaces.workspaces", "dashboard")
    check_connection("online")
    api = wandb.Api()
    entity = entity or str(api.default_entity)
    filters = {"jobType": "evaluate"} | ({} if group is None else {"group": group})
    runs = api.runs(f"{entity}/{called}", filters=filters, order="-created_at")
    logged: set[str] = set()
    for run in runs[:_LATEST]:
        logged.update(run.summary.keys())
    made = workspace(entity, called, logged, group, name or group or "coin")
    made.save()
    return str(made.url)


def workspace(
    entity: str, project: str, logged: Collection[str], group: str | None = None, name: str = "coin"
) -> Any:
    """Return the workspace, not yet saved: NDA by method and decoder, the mean and spread over an experiment's seeds.

    `logged` are the names in the summaries of evaluations' runs: ``nda/METHOD/DECODER``, ….
    """
    ws = extra_module("wandb_workspaces.workspaces", "dashboard")
    wr = extra_module("wandb_workspaces.reports.v2", "dashboard")
    by_decoder: dict[str, list[str]] = {}
    for each in sorted(logged):
        if each.startswith("nda/"):
            by_decoder.setdefault(each.rpartition("/")[2], []).append(each)
    if not by_decoder:
        raise ConfigurationError(
            f"found no run of an evaluation in '{entity}/{project}', group '{group or 'any'}', expected one; "
            "run an experiment, and `wandb sync` its folder"
        )
    spread = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev", "max_bars_to_show": 50}
    bars = []
    for decoder, names in by_decoder.items():
        bars.append(wr.BarPlot(title=f"NDA, {decoder}", metrics=names, **spread))
    sections = [
        ws.Section(name="NDA by method", panels=bars, is_open=True),
        ws.Section(
            name="NDA against memory", panels=[wr.MediaBrowser(media_keys=["nda_against_memory"])]
        ),
        ws.Section(name="Results", panels=[wr.WeavePanelSummaryTable(table_name="results")]),
    ]
    runs = ws.RunsetSettings(
        filters=[] if group is None else [ws.Metric("Group") == group],
        groupby=[ws.Metric("Group"), ws.Metric("JobType")],
        pinned_columns=[
            "config:seed",
            "summary:nda_mean_best",
            "summary:best_method",
            "summary:best_decoder",
        ],
    )
    return ws.Workspace(
        entity=entity, project=project, name=name, sections=sections, runset_settings=runs
    )
