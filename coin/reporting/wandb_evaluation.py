"""An evaluation in W&B: scalars that group by method, the table of all rows, charts and confusions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import wandb

from coin.reporting.extras import Examples
from coin.reporting.results import COLUMNS, NUMBERS, Counts, Row, asked_policy
from coin.reporting.summary import REFERENCES, summarise, variant_names
from coin.reporting.wandb_charts import charts, confusion_charts, contenders, figures, results_table
from coin.reporting.wandb_logging import start_run
from coin.reporting.wandb_settings import in_sweep, mode, run_environment

_SUMS = ("seconds", "passes")
"""What making the coded model and fitting the decoder took together."""
_AXIS = "samples_per_task"
METHOD_TAG = "method"
"""The tag of the runs that hold one method each."""
SUMMARY_TAG = "summary"
"""The tag of the run that holds all seeds."""


def code_axes(tasks: Sequence[str], matrix: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return what a code gives charts to plot against, beside P: N, R and the coding weights.

    Args:
        tasks: The tasks' names, N of them.
        matrix: The code, R rows of N weights.

    Returns:
        ``num_experts``, ``num_coded`` and ``beta/<task>``, or ``beta/<row>/<task>`` where there are several rows.
    """
    rows = [f"{row}/" if len(matrix) > 1 else "" for row in range(len(matrix))]
    weights = {
        f"beta/{row}{task}": float(weight)
        for row, weights in zip(rows, matrix, strict=True)
        for task, weight in zip(tasks, weights, strict=True)
    }
    return {"num_experts": float(len(tasks)), "num_coded": float(len(matrix)), **weights}


def log_evaluation(
    run: wandb.Run,
    rows: Sequence[Row],
    confusions: Mapping[str, Counts] | None = None,
    axes: Mapping[str, float] | None = None,
) -> None:
    """Log one seed's evaluation as an overview of all its methods.

    - Scalars ``<number>/<method>/<decoder>/<task>`` and ``…/mean`` over P, for every number of ``results.csv``, and for
      ``seconds`` and ``passes``, the sums of merging and decoder. An erasure of several tasks stands before its task:
      ``nda/coin/linear/a+b/a``, ``nda/coin/linear/2-of-3/mean``. Numbers that are not defined are left out.
    - Tables ``results`` (all rows) and ``confusions`` (long format); charts under ``charts/`` and ``confusion/``.
    - For sweeps, the summary has ``nda_mean/<decoder>`` (the best method's) and ``nda_mean_best`` with
      ``best_method`` and ``best_decoder``. The best is chosen on the test sets: it ranks, it does not validate.

    Args:
        run: An open run of job type ``evaluate``.
        rows: One seed's measurements.
        confusions: Counts ``[C, C]`` by `confusion_key`.
        axes: What else charts may plot against; see `code_axes`.
    """
    if run.disabled:
        return
    frame = pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS))
    summary = summarise(frame)
    _log_scalars(run, summary, axes or {})
    run.summary.update(_best(summary))
    with run_environment(Path(run.settings.root_dir)):
        run.log({"results": results_table(frame), **charts(summary), **figures(summary)})
        if confusions:
            run.log(confusion_charts(rows, confusions))


def log_examples(run: wandb.Run, examples: Examples) -> None:
    """Log test images with the expert's answer, the decoded answer and the label, as the table ``examples``."""
    columns: list[str | int] = ["image", "task", "expert", "decoded", "label", "differs"]
    last = [examples.expert, *examples.decoded.values()][-1]
    answers = zip(examples.expert, last, examples.label, strict=True)
    tasks = examples.task or ("",) * len(examples.images)
    with run_environment(Path(run.settings.root_dir)):
        rows: Any = [
            [
                wandb.Image(image),
                task,
                *(examples.name_of(answer) for answer in (expert, decoded, label)),
                bool(expert != decoded),
            ]
            for image, task, (expert, decoded, label) in zip(examples.images, tasks, answers, strict=True)
        ]
        run.log({"examples": wandb.Table(columns=columns, data=rows)})


def log_method_runs(
    folder: Path,
    frame: pd.DataFrame,
    *,
    group: str,
    config: Mapping[str, Any],
    tags: Sequence[str] = (),
    axes: Mapping[str, float] | None = None,
) -> None:
    """Log one run per variant of a method, so that a dashboard can group runs by ``method`` and spread over ``seed``.

    Each run is of job type ``evaluate``, has the tag ``method``, and holds ``method``, ``batchnorm`` (the policy asked
    for) and ``batchnorm_taken``, ``variant``, ``reference`` (whether it is no contender) and ``seed`` in its
    configuration beside `config`. Its scalars have no method in their names: ``nda/linear/mean``. An agent of a W&B
    sweep gets none: it knows of one run alone.

    Args:
        folder: The run's folder.
        frame: One seed's measurements, as `coin.reporting.read_results` returns them.
        group: The experiment's name.
        config: The resolved configuration.
        tags: Further tags.
        axes: What else charts may plot against; see `code_axes`.
    """
    if not _extra_runs():
        return
    for name, part in frame.groupby(variant_names(frame), sort=False):
        first = part.iloc[0]
        own = {
            "method": first["method"],
            "batchnorm": asked_policy(first["batchnorm"]),
            "batchnorm_taken": first["batchnorm"],
            "variant": name,
            "seed": int(first["seed"]),
            "reference": first["method"] in REFERENCES,
        }
        run = start_run(
            folder, group=group, job_type="evaluate", name=f"{group}-seed-{own['seed']}-method-{name}",
            config={**config, **own}, tags=[METHOD_TAG, first["method"], *tags],
        )  # fmt: skip
        _log_scalars(run, summarise(part), axes or {}, with_method=False)
        run.finish()


def log_summary(
    folder: Path, summary: pd.DataFrame, *, group: str, config: Mapping[str, Any], tags: Sequence[str] = ()
) -> None:
    """Log one run for all seeds of an experiment: the summary as a table, charts of its means, figures with the spread.

    An agent of a W&B sweep gets none: it knows of one run alone.

    Args:
        folder: The experiment's folder.
        summary: What `coin.reporting.summarise` returns.
        group: The experiment's name.
        config: The resolved configuration.
        tags: Further tags.
    """
    if not _extra_runs():
        return
    run = start_run(
        folder, group=group, job_type="evaluate", name=f"{group}-summary", config=config, tags=[SUMMARY_TAG, *tags]
    )
    with run_environment(folder):
        run.log({"summary": results_table(summary), **charts(summary), **figures(summary)})
    run.summary.update(_best(summary))
    run.finish()


def _extra_runs() -> bool:
    """Return whether there may be runs beside those of the jobs."""
    return not in_sweep() and mode() != "disabled"


def _log_scalars(run: wandb.Run, summary: pd.DataFrame, axes: Mapping[str, float], *, with_method: bool = True) -> None:
    """Log one row of scalars for each P, against it; the other `axes` stand in every row.

    Every name is defined by itself: W&B takes any of several patterns that fit, and Lightning's ``*`` fits all.
    """
    for axis in (_AXIS, *axes):
        run.define_metric(axis)
    defined: set[str] = set()
    for samples, scalars in _by_samples(summary, with_method=with_method):
        for name in scalars.keys() - defined:
            run.define_metric(name, step_metric=_AXIS)
        defined |= scalars.keys()
        run.log({_AXIS: samples, **axes, **scalars})


def _by_samples(summary: pd.DataFrame, *, with_method: bool) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield each P, increasing, with its scalars."""
    sums = {f"{unit}_mean": summary[f"merge_{unit}_mean"] + summary[f"decoder_{unit}_mean"] for unit in _SUMS}
    named = summary.assign(name=variant_names(summary), **sums)
    for samples, part in named.groupby(_AXIS, sort=True):
        scalars = {}
        for _, row in part.iterrows():
            single = row["erased"] == row["task"] or row["erased"].startswith("1 of ")
            leaf = row["task"] if single else f"{row['erased'].replace(' of ', '-of-')}/{row['task']}"
            path = "/".join([*([row["name"]] if with_method else []), row["decoder"], leaf])
            for number in (*NUMBERS, *_SUMS):
                value = float(row[f"{number}_mean"])
                if not math.isnan(value):
                    scalars[f"{number}/{path}"] = value
        yield int(str(samples)), scalars


def _best(summary: pd.DataFrame) -> dict[str, Any]:
    means = contenders(summary)
    means = means[means["nda_mean"].notna()]
    if means.empty:
        return {}
    top = means.iloc[int(means["nda_mean"].to_numpy().argmax())]
    by_decoder = means.groupby("decoder")["nda_mean"].max()
    return {
        **{f"nda_mean/{decoder}": float(value) for decoder, value in by_decoder.items()},
        "nda_mean_best": float(top["nda_mean"]),
        "best_method": top["name"],
        "best_decoder": top["decoder"],
    }
