"""What a W&B dashboard shows beside scalars: tables, interactive charts, figures, confusions."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import wandb
from PIL import Image

from coin.reporting import figures as plots
from coin.reporting.figures import as_png
from coin.reporting.results import COLUMNS, Counts, Row, confusion_key
from coin.reporting.summary import REFERENCES, largest_samples, over_tasks, variant_names

_AXIS = "samples_per_task"


def contenders(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the means over tasks, each lost alone, of the methods that compete."""
    named = summary.assign(name=variant_names(summary))
    return over_tasks(named[~named["method"].isin(REFERENCES)])


def results_table(frame: pd.DataFrame) -> wandb.Table:
    """Return a frame as a table, with None where a number is not defined (W&B's charts stumble over NaN)."""
    rows: Any = [[None if isinstance(x, float) and math.isnan(x) else x for x in row] for row in frame.values.tolist()]
    return wandb.Table(columns=list(frame.columns), data=rows)


def charts(summary: pd.DataFrame) -> dict[str, Any]:
    """Return W&B's own charts, which stay interactive and lay several runs over each other."""
    named = summary.assign(name=variant_names(summary))
    means = contenders(summary)
    found: dict[str, Any] = {}
    largest = largest_samples(means)
    for decoder, part in largest.groupby("decoder", sort=False):
        table = results_table(part[["name", "nda_mean"]])
        found[f"charts/nda_{decoder!s}"] = wandb.plot.bar(table, "name", "nda_mean", title=f"NDA, {decoder!s} decoder")
    largest = largest.assign(seconds=largest["merge_seconds_mean"] + largest["decoder_seconds_mean"])
    found["charts/nda_against_seconds"] = wandb.plot.scatter(
        results_table(largest[["seconds", "nda_mean", "name", "decoder"]]),
        "seconds",
        "nda_mean",
        title="NDA against the seconds of coded model and decoder",
    )
    tasks = named[(named["task"] != "mean") & (named["erased"] == named["task"])]
    for task, part in tasks.groupby("task", sort=False):
        labelled = part.assign(label=part["name"] + " " + part["decoder"])
        found[f"charts/nda_task_{task!s}"] = wandb.plot.bar(
            results_table(labelled[["label", "nda_mean"]]), "label", "nda_mean", title=f"NDA, task {task!s} lost"
        )
    if means[_AXIS].nunique() > 1:
        for decoder, part in means.groupby("decoder", sort=False):
            lines = [(str(name), rows.sort_values(_AXIS)) for name, rows in part.groupby("name", sort=False)]
            found[f"charts/nda_against_samples_{decoder!s}"] = wandb.plot.line_series(
                xs=[rows[_AXIS].tolist() for _, rows in lines],
                ys=[rows["nda_mean"].tolist() for _, rows in lines],
                keys=[name for name, _ in lines],
                title=f"NDA against P, {decoder!s} decoder",
                xname="calibration samples per task, P",
            )
    return found


def figures(summary: pd.DataFrame) -> dict[str, wandb.Image]:
    """Return the report's figures as images: they need no network and show what W&B's charts cannot."""
    means = largest_samples(over_tasks(summary))
    if means.empty or means["method"].isin(REFERENCES).all():
        return {}
    drawn = {
        "nda_by_method": plots.nda_by_method(means),
        "nda_against_cost": plots.nda_against_cost(means),
        "nda_against_residual": plots.nda_against_residual(means),
    }
    return {f"figures/{name}": _image(as_png(figure, dpi=110)) for name, figure in drawn.items()}


def _image(png: bytes) -> wandb.Image:
    return wandb.Image(Image.open(io.BytesIO(png)))


def confusion_charts(rows: Sequence[Row], confusions: Mapping[str, Counts]) -> dict[str, Any]:
    """Return all counts as one long table, and W&B's confusion chart for each method's first decoder."""
    frame = pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS))
    names = variant_names(frame)
    long: Any = []
    logged: dict[str, Any] = {}
    charted: dict[tuple[str, str, str], str] = {}
    for row, name in zip(rows, names, strict=True):
        counts = confusions.get(confusion_key(row))
        if counts is None:
            continue
        cells = [[i, k, int(counts[i, k])] for i, k in zip(*counts.nonzero(), strict=True)]
        cells = [[int(i), int(k), n] for i, k, n in cells]
        long += [[name, row.decoder, row.erased, row.task, *cell] for cell in cells]
        first = charted.setdefault((name, row.erased, row.task), row.decoder)
        if first == row.decoder and row.method != "oracle":
            # wandb.plot.confusion_matrix wants every single prediction; its chart takes counts as well.
            logged[f"confusion/{name}/{row.decoder}/{row.erased}/{row.task}"] = wandb.plot_table(
                vega_spec_name="wandb/confusion_matrix/v1",
                data_table=wandb.Table(
                    columns=["Actual", "Predicted", "nPredictions"],
                    data=[[str(i), str(k), n] for i, k, n in cells],
                ),
                fields={"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"},
                string_fields={"title": f"{name}, {row.decoder}: expert (actual) against decoded, {row.task} lost"},
            )
    columns: list[str | int] = ["method", "decoder", "erased", "task", "expert_answer", "decoded_answer", "count"]
    return {"confusions": wandb.Table(columns=columns, data=long), **logged} if long else {}
