"""``coin dashboard``: a workspace on W&B's server, made by ``wandb-workspaces`` from what evaluations have logged."""

import os
from collections.abc import Collection
from typing import Any

import wandb

from coin.errors import ConfigurationError
from coin.files.packaged import extra_module
from coin.tracking.settings import CONFUSION_CHART, CONFUSION_COLUMNS, OFFLINE_MODES, check_connection


def dashboard(project: str, group: str | None = None, name: str | None = None) -> str:
    """Make a W&B workspace for the experiments of a project, online.

    Args:
        project: ``ENTITY/PROJECT``, or ``PROJECT`` of your default entity.
        group: The one experiment to show; none shows all.
        name: What the workspace is called; none calls it after the experiment, or ``coin``.

    Returns its address. Raises ConfigurationError where that cannot be: offline, or there is no run of an evaluation.
    """
    if len(parts := project.split("/")) > 2 or not all(parts):
        raise ConfigurationError(f"found project '{project}', expected ENTITY/PROJECT or PROJECT")
    if (mode := os.environ.get("WANDB_MODE")) in OFFLINE_MODES:
        told = f"found WANDB_MODE={mode}, but a dashboard lives on W&B's server"
        raise ConfigurationError(f"{told}; unset it for coin dashboard, or write a report with coin report")
    extra_module("wandb_workspaces.workspaces", "dashboard")
    check_connection("online")
    api = wandb.Api()
    entity, called = parts if len(parts) == 2 else (str(api.default_entity), parts[0])
    filters = {"jobType": "evaluate"} | ({} if group is None else {"group": group})
    latest = api.runs(f"{entity}/{called}", filters=filters, order="-created_at")[:200]  # enough for all names
    logged = {each for run in latest for each in run.summary.keys()}  # noqa: SIM118 (not a dict)
    made = workspace(entity, called, logged, group, name or group or "coin")
    made.save()
    return str(made.url)


def workspace(entity: str, project: str, logged: Collection[str], group: str | None = None, name: str = "coin") -> Any:
    """Return the workspace, not yet saved: NDA by method and decoder, the mean and spread over an experiment's seeds.

    `logged` are the names in the summaries of evaluations' runs: ``nda/METHOD/DECODER``, ``confusion/TASK``, ….
    """
    ws, wr = (extra_module(f"wandb_workspaces.{name}", "dashboard") for name in ("workspaces", "reports.v2"))
    by_decoder: dict[str, list[str]] = {}
    for each in sorted(name for name in logged if name.startswith("nda/")):
        by_decoder.setdefault(each.rpartition("/")[2], []).append(each)
    if not by_decoder:
        where = f"'{entity}/{project}'" + (f", group '{group}'" if group else "")
        told = f"found no run of an evaluation in {where}, expected one"
        raise ConfigurationError(f"{told}; run an experiment, and `wandb sync` its folder")
    charts = sorted({each.removesuffix("_table") for each in logged if each.startswith("confusion/")})
    curves = {"Validation accuracy of the experts": "val/accuracy", "Loss of all that is trained": "train/loss"}
    spread = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev", "max_bars_to_show": 50}
    bars = [wr.BarPlot(title=f"NDA, {decoder}", metrics=names, **spread) for decoder, names in by_decoder.items()]
    sections = {
        "NDA by method": bars,
        "NDA against memory": [wr.MediaBrowser(media_keys=["nda_against_memory"])],
        "Training": [wr.LinePlot(title=title, x="epoch", y=[metric]) for title, metric in curves.items()],
        "Confusion": [
            wr.CustomChart(
                query={"summaryTable": {"tableKey": f"{chart}_table"}},
                chart_name=CONFUSION_CHART,
                chart_fields={name: name for name in CONFUSION_COLUMNS},
                chart_strings={"title": f"expert (actual) against decoded, {chart.partition('/')[2]} lost"},
            )
            for chart in charts
        ],
        "Tables": [wr.WeavePanelSummaryTable(table_name=each) for each in ("results", "examples")],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[ws.Section(name=each, panels=panels, is_open=True) for each, panels in sections.items()],
        settings=ws.WorkspaceSettings(max_runs=100, smoothing_type="none"),
        runset_settings=ws.RunsetSettings(
            filters=[] if group is None else [ws.Metric("Group") == group],
            groupby=[ws.Metric("Group"), ws.Metric("JobType")],
            pinned_columns=["config:seed", "summary:nda_mean_best", "summary:best_method", "summary:best_decoder"],
        ),
    )
