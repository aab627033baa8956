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
from coin.reporting.summary import REFERENCES, stand_ins, summarise, variant_names


def log_evaluation(
    run: wandb.Run,
    rows: Sequence[Row],
    confusions: Mapping[str, Counts],
    classes: Mapping[str, Sequence[str]],
) -> None:
    """Log one seed's evaluation into an open run.

    The summary has ``nda/METHOD/DECODER``, means over tasks, each lost alone, and for W&B's sweeps ``nda_mean_best``
    (on the test sets: it ranks, it does not validate), with ``best_method``, ``best_decoder``, ``best_memory_mib`` and
    ``best_resident_mib``. The table ``results`` has all rows; ``confusion/TASK`` is a chart of the best method's counts
    ``[C, C]``.
    """
    frame = pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS))
    cells: Any = frame.astype(object).where(frame.notna(), None)  # W&B's charts stumble over NaN
    logged: dict[str, Any] = {
        "results": wandb.Table(columns=[*COLUMNS], data=cells.to_numpy().tolist()),
    }
    kept = stand_ins(summarise(frame))
    frame = frame.assign(name=variant_names)
    if len(kept):
        png = as_png(nda_against_memory(kept), dpi=110)
        logged["nda_against_memory"] = wandb.Image(Image.open(io.BytesIO(png)))
    best = _best_coded(frame, kept)
    for place in best.index:
        row = rows[place]
        title = f"{row.method}, {row.decoder}: expert (actual) against decoded, {row.task} lost"
        counts = confusions[confusion_key(row)]
        logged[f"confusion/{row.task}"] = _confusion(counts, classes[row.task], title)
    run.log(logged)
    run.summary.update(_numbers(frame, best))


def _numbers(frame: pd.DataFrame, best: pd.DataFrame) -> dict[str, Any]:
    """Return the numbers of the run's summary, given the best rows."""
    alone = frame[frame["erased"] == frame["task"]]
    numbers: dict[str, Any] = {}
    for (name, decoder), own in alone.groupby(["name", "decoder"], sort=False):
        if own["nda"].notna().all():
            numbers[f"nda/{name}/{decoder}"] = float(own["nda"].mean())
    if len(best):
        numbers["nda_mean_best"] = float(best["nda"].mean())
        numbers["best_method"] = best["name"].iloc[0]
        numbers["best_decoder"] = best["decoder"].iloc[0]
        numbers["best_memory_mib"] = float(best["memory_mib"].mean())
        numbers["best_resident_mib"] = float(best["resident_mib"].mean())
    return numbers


def _best_coded(frame: pd.DataFrame, kept: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the coded variant and decoder of `stand_ins` with the largest mean NDA."""
    contenders = kept[~kept["name"].isin(REFERENCES) & (kept["decoder"] != REPLICA)]
    if contenders.empty:
        return frame[:0]
    best = contenders.sort_values("nda_mean", ascending=False, kind="stable").iloc[0]
    is_best = (frame["name"] == best["name"]) & (frame["decoder"] == best["decoder"])
    rows: pd.DataFrame = frame[is_best & (frame["erased"] == frame["task"])]
    return rows


def _confusion(counts: Counts, classes: Sequence[str], title: str) -> Any:
    """Return W&B's confusion chart, which `wandb.plot.confusion_matrix` makes of single predictions, of counts."""
    columns = ["Actual", "Predicted", "nPredictions"]
    table = wandb.Table(columns=[*columns])
    for actual, predicted in zip(*counts.nonzero(), strict=True):
        count = int(counts[actual, predicted])
        table.add_data(classes[actual], classes[predicted], count)
    return wandb.plot_table(
        "wandb/confusion_matrix/v1",
        table,
        dict(zip(columns, columns, strict=True)),
        {"title": title},
    )
