"""An evaluation in W&B: scalars that group by method, the table of all rows, charts and confusions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import wandb

from coin.reporting.comparison import REFERENCES, variant_names
from coin.reporting.extras import Examples
from coin.reporting.results import COLUMNS, Counts, Row
from coin.reporting.summary import summarise
from coin.reporting.wandb_charts import charts, confusion_charts, contenders, figures, results_table
from coin.reporting.wandb_logging import start_run
from coin.reporting.wandb_settings import run_environment

_SCALARS = {
    "nda": "nda",
    "decoded_accuracy": "decoded_accuracy",
    "expert_accuracy": "expert_accuracy",
    "agreement": "agreement",
    "residual": "residual",
    "calibration_seconds": "seconds",
    "sample_passes": "passes",
}
_AXIS = "samples_per_task"


def log_evaluation(run: wandb.Run, rows: Sequence[Row], confusions: Mapping[str, Counts] | None = None) -> None:
    """Log one seed's evaluation as an overview of all its methods.

    - Scalars ``<number>/<method>/<decoder>/<task>`` and ``…/mean`` over P, for NDA, decoded and expert accuracy,
      agreement, residual, seconds and passes. An erasure of several tasks stands before its task:
      ``nda/coin/linear/a+b/a``, ``nda/coin/linear/2-of-3/mean``. Numbers that are not defined are left out.
    - Tables ``results`` (all rows) and ``confusions`` (long format); charts under ``charts/`` and ``confusion/``.
    - For sweeps, the summary has ``nda_mean/<decoder>`` (the best method's) and ``nda_mean_best`` with
      ``best_method`` and ``best_decoder``. The best is chosen on the test sets: it ranks, it does not validate.

    Args:
        run: An open run of job type ``evaluate``.
        rows: One seed's measurements.
        confusions: Counts ``[C, C]`` by `confusion_key`.
    """
    frame = pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS))
    summary = summarise(frame)
    run.define_metric(_AXIS)
    for prefix in _SCALARS.values():
        run.define_metric(f"{prefix}/*", step_metric=_AXIS)
    for samples, scalars in _by_samples(summary):
        run.log({_AXIS: samples, **scalars})
    run.summary.update(_best(summary))
    with run_environment(Path(run.settings.root_dir)):
        run.log({"results": results_table(frame), **charts(summary), **figures(summary)})
        if confusions:
            run.log(confusion_charts(rows, confusions))


def log_examples(run: wandb.Run, examples: Examples) -> None:
    """Log test images with the expert's answer, the decoded answer and the label, as the table ``examples``."""
    columns: list[str | int] = ["image", "expert", "decoded", "label", "differs"]
    answers = zip(examples.expert, examples.decoded, examples.label, strict=True)
    with run_environment(Path(run.settings.root_dir)):
        rows: Any = [
            [wandb.Image(image), examples.name_of(expert), examples.name_of(decoded), examples.name_of(label),
             bool(expert != decoded)]
            for image, (expert, decoded, label) in zip(examples.images, answers, strict=True)
        ]  # fmt: skip
        run.log({"examples": wandb.Table(columns=columns, data=rows)})


def log_method_runs(
    folder: Path, rows: Sequence[Row], *, group: str, config: Mapping[str, Any], tags: Sequence[str] = ()
) -> None:
    """Log one run per variant of a method, so that a dashboard can group runs by ``method`` and spread over ``seed``.

    Each run is of job type ``evaluate``, has the tag ``method``, and holds ``method``, ``batchnorm``, ``variant`` and
    ``seed`` in its configuration beside `config`. Its scalars have no method in their names: ``nda/linear/mean``.

    Args:
        folder: The run's folder.
        rows: One seed's measurements.
        group: The experiment's name.
        config: The resolved configuration.
        tags: Further tags.
    """
    frame = pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS))
    for name, part in frame.groupby(variant_names(frame), sort=False):
        first = part.iloc[0]
        own = {
            "method": first["method"],
            "batchnorm": first["batchnorm"],
            "variant": name,
            "seed": int(first["seed"]),
            "reference": first["method"] in REFERENCES,
        }
        run = start_run(
            folder, group=group, job_type="evaluate", name=f"{name} seed {own['seed']}",
            config={**config, **own}, tags=["method", *tags],
        )  # fmt: skip
        run.define_metric(_AXIS)
        for prefix in _SCALARS.values():
            run.define_metric(f"{prefix}/*", step_metric=_AXIS)
        for samples, scalars in _by_samples(summarise(part), with_method=False):
            run.log({_AXIS: samples, **scalars})
        run.finish()


def _by_samples(summary: pd.DataFrame, *, with_method: bool = True) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield each P, increasing, with its scalars."""
    named = summary.assign(name=variant_names(summary))
    for samples, part in named.groupby(_AXIS, sort=True):
        scalars = {}
        for _, row in part.iterrows():
            single = row["erased"] == row["task"] or row["erased"].startswith("1 of ")
            leaf = row["task"] if single else f"{row['erased'].replace(' of ', '-of-')}/{row['task']}"
            path = "/".join([*([row["name"]] if with_method else []), row["decoder"], leaf])
            for number, prefix in _SCALARS.items():
                value = float(row[f"{number}_mean"])
                if not math.isnan(value):
                    scalars[f"{prefix}/{path}"] = value
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
