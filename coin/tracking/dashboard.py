"""``coin dashboard``: a workspace on W&B's server, made by ``wandb-workspaces`` from what evaluations have logged."""

import os
from collections.abc import Collection
from itertools import islice
from typing import Any

import wandb

from coin.errors import ConfigurationError
from coin.files.packaged import how_to_install
from coin.tracking.settings import CONFUSION_CHART, CONFUSION_COLUMNS, OFFLINE_MODES, check_connection

_RUNS = 200  # the latest ones, enough for every name that an experiment logs


def dashboard(project: str, group: str | None = None, name: str | None = None) -> str:
    """Make a W&B workspace for the experiments of a project, online.

    Args:
        project: ``ENTITY/PROJECT``, or ``PROJECT`` of your default entity.
        group: The one experiment to show; none shows all.
        name: What the workspace is called; none calls it after the experiment, or ``coin``.

    Returns its address. Raises ConfigurationError where ``WANDB_MODE`` is offline, ``wandb-workspaces`` is not
    installed, or the project is missing or has no run of an evaluation; ConnectionFailedError where there is no API
    key or no answer.
    """
    parts = project.split("/")
    if len(parts) > 2 or not all(parts):
        raise ConfigurationError(f"found project '{project}', expected ENTITY/PROJECT or PROJECT")
    if (mode := os.environ.get("WANDB_MODE")) in OFFLINE_MODES:
        raise ConfigurationError(
            f"found WANDB_MODE={mode}, but a dashboard lives on W&B's server; unset it for coin dashboard, or write "
            "the report of a folder with coin report"
        )
    _import()
    check_connection("online", later=False)
    entity, called = parts if len(parts) == 2 else (str(wandb.Api().default_entity), parts[0])
    filters = {"jobType": "evaluate", **({} if group is None else {"group": group})}
    found = islice(wandb.Api().runs(f"{entity}/{called}", filters=filters, order="-created_at"), _RUNS)
    logged = {each for run in found for each in run.summary.keys()}  # noqa: SIM118 (not a dict)
    made = workspace(entity, called, logged, group, name or group or "coin")
    made.save()
    return str(made.url)


def workspace(entity: str, project: str, logged: Collection[str], group: str | None = None, name: str = "coin") -> Any:
    """Return the workspace, not yet saved: NDA by method and decoder, the mean and spread over an experiment's seeds.

    `logged` are the names in the summaries of evaluations' runs: ``nda/METHOD/DECODER``, ``confusion/TASK``, …; it is
    refused without any NDA.
    """
    ws, wr = _import()
    by_decoder: dict[str, list[str]] = {}
    for each in sorted(logged):
        if each.startswith("nda/"):
            by_decoder.setdefault(each.rpartition("/")[2], []).append(each)
    if not by_decoder:
        raise ConfigurationError(
            f"found no run of an evaluation in '{entity}/{project}'{f', group {group!r}' if group else ''}, expected "
            "one; run an experiment, and `wandb sync` its folder"
        )
    tasks = sorted(each.partition("/")[2].removesuffix("_table") for each in logged if each.startswith("confusion/"))
    curves = {"Validation accuracy of the experts": "val/accuracy", "Loss of all that is trained": "train/loss"}
    spread = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev", "max_bars_to_show": 50}
    sections = {
        "NDA by method": [
            wr.BarPlot(title=f"NDA, {decoder}", metrics=names, **spread) for decoder, names in by_decoder.items()
        ],
        "NDA against memory": [wr.MediaBrowser(media_keys=["nda_against_memory"])],
        "Training": [wr.LinePlot(title=title, x="epoch", y=[metric]) for title, metric in curves.items()],
        "Confusion": [
            wr.CustomChart(
                query={"summaryTable": {"tableKey": f"confusion/{task}_table"}},
                chart_name=CONFUSION_CHART,
                chart_fields={name: name for name in CONFUSION_COLUMNS},
                chart_strings={"title": f"expert (actual) against decoded, {task} lost"},
            )
            for task in dict.fromkeys(tasks)
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


def _import() -> tuple[Any, Any]:
    """Return the modules that build workspaces and their panels."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        needed = f"which builds dashboards: {how_to_install('dashboard')}"
        raise ConfigurationError(f"found no package wandb-workspaces ({error}), {needed}") from error
    return workspaces, reports
