"""A seed's evaluation in W&B: numbers in the summary of its run, one table of all rows, few pictures."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import wandb
from PIL import Image

from coin.coding.decoder_config import REPLICA
from coin.reporting.figures import nda_against_memory
from coin.reporting.results import COLUMNS, Counts, Row, confusion_key
from coin.reporting.style import as_png
from coin.reporting.summary import REFERENCES, over_tasks, stand_ins, summarise, variant_names
from coin.tracking.settings import CONFUSION_CHART, CONFUSION_COLUMNS


def log_evaluation(
    run: wandb.Run,
    rows: Sequence[Row],
    confusions: Mapping[str, Counts],
    classes: Mapping[str, Sequence[str]],
    examples: wandb.Table,
) -> None:
    """Log one seed's evaluation into an open run.

    The summary has ``nda/METHOD/DECODER``, means over tasks, each lost alone, and for W&B's sweeps ``nda_mean_best``
    (on the test sets: it ranks, it does not validate), with ``best_method``, ``best_decoder``, ``best_memory_mib`` and
    ``best_resident_mib``. The tables are ``results`` (all rows) and ``examples``; ``confusion/TASK`` is a chart of the
    best method's counts ``[C, C]``.
    """
    frame = _frame(rows)
    summary = summarise(frame)
    cells: Any = frame.astype(object).where(frame.notna(), None)  # W&B's charts stumble over NaN
    logged: dict[str, Any] = {
        "results": wandb.Table(columns=[*COLUMNS], data=cells.to_numpy().tolist()),
        "examples": examples,
    }
    kept = stand_ins(summary)
    if len(kept):
        png = as_png(nda_against_memory(kept), dpi=110)
        logged["nda_against_memory"] = wandb.Image(Image.open(io.BytesIO(png)))
    for place in best_coded(rows):
        row = rows[place]
        title = f"{row.method}, {row.decoder}: expert (actual) against decoded, {row.task} lost"
        logged[f"confusion/{row.task}"] = _confusion(confusions[confusion_key(row)], classes[row.task], title)
    run.log(logged)
    run.summary.update(_numbers(summary))


def best_coded(rows: Sequence[Row]) -> list[int]:
    """Return the places of the rows of the best coded variant and decoder by mean NDA, each task lost alone."""
    frame = _frame(rows)
    means = _coded_means(summarise(frame))
    if means.empty:
        return []
    best = means.iloc[-1]
    is_best = (variant_names(frame) == best["name"]) & (frame["decoder"] == best["decoder"])
    return [int(place) for place in frame.index[is_best & (frame["erased"] == frame["task"])]]


def _frame(rows: Sequence[Row]) -> pd.DataFrame:
    return pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS))


def _means(summary: pd.DataFrame) -> pd.DataFrame:
    return over_tasks(summary.assign(name=variant_names(summary))).dropna(subset="nda_mean")


def _coded_means(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the means over tasks of coded models, the best last."""
    means = _means(summary)
    is_coded = ~means["method"].isin(REFERENCES) & (means["decoder"] != REPLICA)
    return means[is_coded].sort_values("nda_mean")


def _numbers(summary: pd.DataFrame) -> dict[str, Any]:
    """Return the numbers of the run's summary."""
    means = _means(summary)
    names = "nda/" + means["name"] + "/" + means["decoder"]
    numbers: dict[str, Any] = dict(zip(names, means["nda_mean"], strict=True))
    coded = _coded_means(summary)
    if len(coded):
        best = coded.iloc[-1]
        numbers["nda_mean_best"] = float(best["nda_mean"])
        numbers["best_method"] = best["name"]
        numbers["best_decoder"] = best["decoder"]
        numbers["best_memory_mib"] = float(best["memory_mib_mean"])
        numbers["best_resident_mib"] = float(best["resident_mib_mean"])
    return numbers


def _confusion(counts: Counts, classes: Sequence[str], title: str) -> Any:
    """Return W&B's confusion chart, which `wandb.plot.confusion_matrix` makes of single predictions, of counts."""
    cells: Any = [[classes[i], classes[k], int(counts[i, k])] for i, k in zip(*counts.nonzero(), strict=True)]
    return wandb.plot_table(
        vega_spec_name=CONFUSION_CHART,
        data_table=wandb.Table(columns=[*CONFUSION_COLUMNS], data=cells),
        fields={name: name for name in CONFUSION_COLUMNS},
        string_fields={"title": title},
    )
