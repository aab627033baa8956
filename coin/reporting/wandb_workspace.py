"""The W&B workspace of a project: its sections, built from the names of what the project's runs have logged.

It needs the package ``wandb-workspaces`` (the extra ``dashboard``), which is imported where a workspace is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coin.errors import ConfigurationError
from coin.reporting.wandb_evaluation import METHOD_TAG

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

_CONFUSION_FIELDS = {name: name for name in ("Actual", "Predicted", "nPredictions")}


@dataclass(frozen=True)
class Logged:
    """The names of what evaluations have logged.

    Args:
        overviews: Of the runs that hold all methods: ``nda/coin/linear/mean``, ``results``, …
        methods: Of the runs that hold one method each: ``nda/linear/mean``, …
    """

    overviews: frozenset[str]
    methods: frozenset[str]

    @classmethod
    def of(cls, runs: Iterable[tuple[Iterable[str], Iterable[str]]]) -> Logged:
        """Return the names of runs, each given by its tags and by the names in its summary."""
        overviews: set[str] = set()
        methods: set[str] = set()
        for tags, names in runs:
            (methods if METHOD_TAG in tags else overviews).update(names)
        return cls(frozenset(overviews), frozenset(methods))

    @property
    def decoders(self) -> list[str]:
        """The decoders, of which the methods' runs have a mean NDA."""
        return [decoder for decoder, leaf in self._measured() if leaf == "mean"]

    @property
    def tasks(self) -> list[str]:
        """The tasks that were lost alone."""
        return sorted({leaf for _, leaf in self._measured()} - {"mean"})

    def _measured(self) -> list[tuple[str, str]]:
        parts = [name.split("/") for name in sorted(self.methods) if name.startswith("nda/")]
        return [(part[1], part[2]) for part in parts if len(part) == 3]


def workspace(entity: str, project: str, logged: Logged, group: str | None = None, name: str = "coin") -> ws.Workspace:
    """Return the workspace, not yet saved: what was logged, grouped by experiment, job type and method.

    Bars and points are methods, with the spread over seeds; lines are methods over P, N and the coding weights.

    Args:
        entity: Whose project it is.
        project: The project.
        logged: What its evaluations have logged.
        group: The one experiment to show; none shows all.
        name: What the workspace is called.

    Raises:
        ConfigurationError: The methods have no runs of their own to group, or ``wandb-workspaces`` is not installed.
    """
    ws = workspaces()
    if not logged.decoders:
        raise ConfigurationError(
            f"found no run of a single method in '{entity}/{project}'"
            + (f", group '{group}'" if group else "")
            + ", expected them to group by; run an experiment with wandb.method_runs=true and `wandb sync` its folder"
        )
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=title, panels=panels, is_open=number < 3)
            for number, (title, panels) in enumerate(_sections(logged).items())
            if panels
        ],
        settings=ws.WorkspaceSettings(max_runs=100, smoothing_type="none"),
        runset_settings=ws.RunsetSettings(
            filters=[] if group is None else [ws.Metric("Group") == group],
            groupby=[ws.Metric("Group"), ws.Metric("JobType"), ws.Config("variant")],
            pinned_columns=["config:variant", "config:seed", *(f"summary:nda/{d}/mean" for d in logged.decoders)],
        ),
    )


def workspaces() -> Any:
    """Return the module that builds workspaces.

    Raises:
        ConfigurationError: ``wandb-workspaces`` is not installed.
    """
    try:
        import wandb_workspaces.workspaces
    except ImportError as error:
        raise ConfigurationError(
            f"found no package wandb-workspaces ({error}), which builds dashboards; "
            "install it with `pip install 'coded-coin[dashboard]'`"
        ) from error
    return wandb_workspaces.workspaces


def _sections(logged: Logged) -> Mapping[str, list[Any]]:
    """Return the panels of each section."""
    import wandb_workspaces.reports.v2 as wr

    means = {decoder: f"nda/{decoder}/mean" for decoder in logged.decoders}
    axes = ["num_experts", *sorted(name for name in logged.methods if name.startswith("beta/"))]
    return {
        "NDA by method": [_bars(wr, f"NDA, {decoder}", mean) for decoder, mean in means.items()],
        "NDA against cost": [
            wr.ScatterPlot(
                title=f"NDA against {what}, {decoder}",
                x=wr.SummaryMetric(f"{number}/{decoder}/mean"),
                y=wr.SummaryMetric(mean),
                log_x=True,
            )
            for decoder, mean in means.items()
            for number, what in (("seconds", "seconds in all"), ("passes", "forward-equivalents in all"))
        ],
        "NDA against P": [
            _lines(wr, f"NDA against P, {decoder}", "samples_per_task", mean, "calibration samples per task, P")
            for decoder, mean in means.items()
        ],
        "NDA by task": [
            _bars(wr, f"NDA, {task} lost, {decoder}", f"nda/{decoder}/{task}")
            for task in logged.tasks
            for decoder in logged.decoders
        ],
        "NDA against N and the code": [
            _lines(wr, f"NDA against {axis}, {decoder}", axis, mean, axis)
            for axis in axes
            for decoder, mean in means.items()
        ],
        "Residual": [
            wr.ScatterPlot(
                title=f"NDA against the residual, {decoder}",
                x=wr.SummaryMetric(f"residual/{decoder}/mean"),
                y=wr.SummaryMetric(mean),
            )
            for decoder, mean in means.items()
        ],
        "Tables": [
            wr.WeavePanelSummaryTable(table_name=name, layout=wr.Layout(w=24, h=12))
            for name in ("summary", "results", "examples", "confusions")
            if name in logged.overviews
        ],
        "Confusion of expert and decoded": list(_confusions(wr, logged.overviews)),
        "Experts": [
            wr.LinePlot(title="Validation accuracy", x="epoch", y=["val/accuracy"], title_x="epoch"),
            wr.LinePlot(title="Training loss", x="epoch", y=["train/loss"], title_x="epoch"),
        ],
    }


def _bars(wr: Any, title: str, metric: str) -> wr.BarPlot:
    """Return one bar a method, its mean over runs, with the standard deviation."""
    return wr.BarPlot(
        title=title,
        metrics=[metric],
        groupby=wr.Config("variant"),
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_bars_to_show=50,
    )


def _lines(wr: Any, title: str, axis: str, metric: str, label: str) -> wr.LinePlot:
    """Return one line a method."""
    return wr.LinePlot(
        title=title,
        x=axis,
        y=[metric],
        title_x=label,
        groupby=wr.Config("variant"),
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_runs_to_show=100,
    )


def _confusions(wr: Any, names: frozenset[str]) -> Iterator[wr.CustomChart]:
    """Yield the chart of each confusion matrix; what its table is called says what it is of."""
    for name in sorted(names):
        if name.startswith("confusion/") and name.endswith("_table"):
            yield wr.CustomChart(
                query={"summaryTable": {"tableKey": name}},
                chart_name="wandb/confusion_matrix/v1",
                chart_fields=_CONFUSION_FIELDS,
                chart_strings={"title": name.removeprefix("confusion/").removesuffix("_table")},
            )
