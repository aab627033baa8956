"""``coin dashboard``: a workspace on W&B's server, made by ``wandb-workspaces`` from what methods' runs have logged."""

import os
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

import wandb

from coin.errors import CoinError, ConfigurationError, first_line
from coin.files.packaged import how_to_install
from coin.tracking.settings import CONFUSION_CHART, CONFUSION_COLUMNS, OFFLINE_MODES, check_connection

_FIGURES = ("nda_against_memory", "nda_against_cost", "risk")  # of an evaluation, ``figures/NAME``
_RUNS = 200  # the latest ones, enough for every name that an experiment logs


def dashboard(project: str, group: str | None = None, name: str | None = None) -> str:
    """Make a W&B workspace for the experiments of a project, online.

    Args:
        project: ``ENTITY/PROJECT``, or ``PROJECT`` of your default entity.
        group: The one experiment to show; none shows all.
        name: What the workspace is called; none calls it after the experiment, or ``coin``.

    Returns its address. Raises ConfigurationError where ``WANDB_MODE`` is offline, ``wandb-workspaces`` is not
    installed, or the project is missing or has no run of a method; ConnectionFailedError where there is no API key or
    no answer.
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
    try:
        entity, called = parts if len(parts) == 2 else (str(wandb.Api().default_entity), parts[0])
        filters = {"jobType": "method", **({} if group is None else {"group": group})}
        found = islice(wandb.Api().runs(f"{entity}/{called}", filters=filters, order="-created_at"), _RUNS)
        logged = {each for run in found for each in run.summary.keys()}  # noqa: SIM118 (not a dict)
        made = workspace(entity, called, logged, group, name or group or "coin")
        made.save()
        return str(made.url)
    except CoinError:
        raise
    except Exception as error:  # W&B's own exceptions share no base class
        raise ConfigurationError(
            f"W&B did not make a dashboard for '{project}' ({first_line(error)}); check the names, and that "
            "runs of coin run were logged online or brought there by `wandb sync`"
        ) from error


def workspace(entity: str, project: str, logged: Collection[str], group: str | None = None, name: str = "coin") -> Any:
    """Return the workspace, not yet saved: bars and points are methods, with the spread over seeds.

    `logged` are the names in the summaries of the methods' runs: ``nda/linear/mean``, …; it is refused without any.
    """
    ws, wr = _import()
    measured = [parts[1:] for parts in sorted(each.split("/") for each in logged) if parts[0] == "nda"]
    decoders = [parts[0] for parts in measured if parts[1:] == ["mean"]]
    if not decoders:
        raise ConfigurationError(
            f"found no run of a method in '{entity}/{project}'{f', group {group!r}' if group else ''}, expected them "
            "to group by; run an experiment, and `wandb sync` its folder"
        )
    tasks = sorted({parts[1] for parts in measured if len(parts) == 2} - {"mean"})

    def bars(title: str, metric: str) -> Any:
        group = {"groupby": wr.Config("variant"), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
        return wr.BarPlot(title=title, metrics=[metric], max_bars_to_show=50, **group)

    def points(decoder: str, x: Any, against: str, log: bool = False) -> Any:
        y = wr.SummaryMetric(f"nda/{decoder}/mean")
        return wr.ScatterPlot(title=f"NDA against {against}, {decoder}", x=x, y=y, log_x=log)

    costs = {"seconds": "seconds in all", "passes": "forward-equivalents in all"}
    axes = {"samples_per_task": "P", "num_experts": "N"}
    curves = {"Validation accuracy of the experts": "val/accuracy", "Loss of all that is trained": "train/loss"}

    def confusion(task: str) -> Any:
        return wr.CustomChart(
            query={"summaryTable": {"tableKey": f"confusion/{task}/{task}_table"}},
            chart_name=CONFUSION_CHART,
            chart_fields={name: name for name in CONFUSION_COLUMNS},
            chart_strings={"title": f"expert (actual) against decoded, {task} lost"},
        )

    sections: Mapping[str, list[Any]] = {
        "NDA against memory": [
            points(each, wr.SummaryMetric(f"memory_mib/{each}"), "what must be kept in MiB", True) for each in decoders
        ],
        "NDA by method": [bars(f"NDA, {each}", f"nda/{each}/mean") for each in decoders],
        "Training": [wr.LinePlot(title=title, x="epoch", y=[metric]) for title, metric in curves.items()],
        "Memory, cost and risk of each seed": [wr.MediaBrowser(media_keys=[f"figures/{each}"]) for each in _FIGURES],
        "Confusion": [confusion(task) for task in tasks],
        "NDA against cost": [
            points(d, wr.SummaryMetric(f"{u}/{d}"), s, True) for d in decoders for u, s in costs.items()
        ],
        "NDA by task": [bars(f"NDA, {t} lost, {each}", f"nda/{each}/{t}") for t in tasks for each in decoders],
        "NDA against P and N": [points(d, wr.Config(axis), said) for axis, said in axes.items() for d in decoders],
        "NDA against the residual": [points(each, wr.SummaryMetric("residual"), "the residual") for each in decoders],
        "Tables": [wr.WeavePanelSummaryTable(table_name=each) for each in ("summary", "results", "risk", "examples")],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[ws.Section(name=each, panels=panels, is_open=True) for each, panels in sections.items()],
        settings=ws.WorkspaceSettings(max_runs=100, smoothing_type="none"),
        runset_settings=ws.RunsetSettings(
            filters=[] if group is None else [ws.Metric("Group") == group],
            groupby=[ws.Metric("Group"), ws.Metric("JobType"), ws.Config("variant")],
            pinned_columns=["config:variant", "config:seed", *(f"summary:nda/{each}/mean" for each in decoders)],
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
