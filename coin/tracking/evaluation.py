"""A seed's evaluation in W&B: numbers in the summary of its run, one table of all rows, few pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import wandb

from coin.coding.decoder_config import REPLICA
from coin.reporting.choice import shortlist, undominated
from coin.reporting.figures import nda_against_memory
from coin.reporting.results import COLUMNS, Counts, Row, confusion_key
from coin.reporting.standins import STAND_IN, standins
from coin.reporting.summary import REFERENCES


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
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    cells: Any = frame.astype(object).where(frame.notna(), None)  # W&B's charts stumble over NaN
    logged: dict[str, Any] = {"results": wandb.Table(dataframe=cells)}
    kept = standins(frame)
    if len(kept):
        shown = shortlist(kept)
        figure = nda_against_memory(kept[shown], undominated(kept)[shown])
        logged["nda_against_memory"] = wandb.Image(figure)
    alone = frame[frame["erased"] == frame["task"]]
    means: Any = alone.groupby(STAND_IN, sort=False)["nda"].mean(skipna=False).dropna()
    numbers = {f"nda/{method}/{decoder}": nda for (method, decoder), nda in means.items()}

    coded = kept[~kept["method"].isin(REFERENCES) & (kept["decoder"] != REPLICA)]
    if len(coded):
        best = coded.iloc[coded["nda_mean"].argmax()]
        numbers["nda_mean_best"] = best["nda_mean"]
        for name in ("method", "decoder", "memory_mib", "resident_mib"):
            numbers[f"best_{name}"] = best[name]
        is_best = (alone[STAND_IN] == best[STAND_IN]).all(axis=1)
        for place in alone.index[is_best]:
            row = rows[place]
            title = f"{row.method}, {row.decoder}: expert (actual) against decoded, {row.task} lost"
            counts = confusions[confusion_key(row)]
            logged[f"confusion/{row.task}"] = _confusion(counts, classes[row.task], title)
    run.log(logged)
    run.summary.update(numbers)


def _confusion(counts: Counts, classes: Sequence[str], title: str) -> Any:
    """Return W&B's confusion chart, which it makes of single predictions, of counts ``[C, C]``."""
    places = np.indices(counts.shape).reshape(2, -1)
    actual, predicted = places.repeat(counts.ravel(), axis=1).tolist()
    return wandb.plot.confusion_matrix(
        y_true=actual, preds=predicted, class_names=list(classes), title=title
    )
