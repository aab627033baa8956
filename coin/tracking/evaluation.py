"""A seed's evaluation in W&B: numbers in the summary of its run, one table of all rows, few pictures."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from coin.coding.decoder_config import REPLICA
from coin.reporting.extras import Examples
from coin.reporting.figures import nda_against_memory
from coin.reporting.results import COLUMNS, Counts, Row, confusion_key
from coin.reporting.style import as_png
from coin.reporting.summary import REFERENCES, over_tasks, stand_ins, summarise, variant_names
from coin.tracking.settings import CONFUSION_CHART, CONFUSION_COLUMNS, run_environment

if TYPE_CHECKING:
    import wandb


def log_evaluation(
    run: "wandb.Run",
    rows: Sequence[Row],
    confusions: Mapping[str, Counts] | None = None,
    examples: Examples | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Log one seed's evaluation into an open run.

    The summary has ``nda/METHOD/DECODER`` for all that the report shows: the mean over tasks, each lost alone, and for
    W&B's sweeps ``nda_mean_best`` with ``best_method`` and ``best_decoder`` (on the test sets: it ranks, it does not
    validate). The tables are ``results`` (all rows) and ``examples`` (test images with the best decoder's answers);
    ``confusion/TASK`` is a chart of the best method's `confusions`, counts ``[C, C]`` by `confusion_key`, with the
    names of its `classes`; ``nda_against_memory`` is the report's first figure.
    """
    if run.disabled:
        return
    import wandb

    frame = pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS))
    summary = summarise(frame)
    means = over_tasks(summary.assign(name=variant_names(summary))).dropna(subset="nda_mean")
    numbers: dict[str, Any] = {
        f"nda/{row['name']}/{row['decoder']}": row["nda_mean"] for row in means.to_dict("records")
    }
    numbers |= (top := best(means))
    logged: dict[str, Any] = {"results": _table(frame)}
    kept = stand_ins(summary)
    if (kept["memory_mib"] > 0).any():
        picture = Image.open(io.BytesIO(as_png(nda_against_memory(kept), dpi=110)))
        logged["nda_against_memory"] = wandb.Image(picture)
    if examples is not None:
        logged["examples"] = _examples(examples, top.get("best_decoder"))
    for row, name in zip(rows, variant_names(frame), strict=True):
        counts = (confusions or {}).get(confusion_key(row))
        is_best = (name, row.decoder) == (top.get("best_method"), top.get("best_decoder"))
        if counts is not None and is_best and row.erased == row.task:
            title = f"{name}, {row.decoder}: expert (actual) against decoded, {row.task} lost"
            logged[f"confusion/{row.task}"] = _confusion(counts, (classes or {}).get(row.task, ()), title)
    with run_environment(Path(run.settings.root_dir)):
        run.log(logged)
    run.summary.update(numbers)


def best(means: pd.DataFrame) -> dict[str, Any]:
    """Return the largest mean NDA of all coded models and decoders, and whose it is; nothing without a coded model."""
    coded = means[~means["method"].isin(REFERENCES) & (means["decoder"] != REPLICA)]
    if coded.empty:
        return {}
    top = coded.sort_values("nda_mean").iloc[-1]
    return {"nda_mean_best": float(top["nda_mean"]), "best_method": top["name"], "best_decoder": top["decoder"]}


def _table(frame: pd.DataFrame) -> "wandb.Table":
    """Return a frame as a table, with None where a number is not defined (W&B's charts stumble over NaN)."""
    import wandb

    rows: Any = [[None if isinstance(x, float) and math.isnan(x) else x for x in row] for row in frame.values.tolist()]
    return wandb.Table(columns=list(frame.columns), data=rows)


def _examples(examples: Examples, decoder: str | None) -> "wandb.Table":
    """Return test images with the label, the expert's answer and every method's by one decoder."""
    decoded = {key.rpartition("|"): answers for key, answers in examples.decoded.items()}
    own = {name.strip("|"): answers for (name, _, by), answers in decoded.items() if by == decoder}
    shown = {"label": examples.label, "expert": examples.expert, **own}
    tasks = examples.task or ("",) * len(examples.images)
    import wandb

    rows: Any = [
        [wandb.Image(image), task, *(examples.name_of(int(each[i])) for each in shown.values())]
        for i, (image, task) in enumerate(zip(examples.images, tasks, strict=True))
    ]
    return wandb.Table(columns=["image", "task", *shown], data=rows)


def _confusion(counts: Counts, classes: Sequence[str], title: str) -> Any:
    """Return W&B's confusion chart, which `wandb.plot.confusion_matrix` makes of single predictions, of counts."""
    import wandb

    names = [classes[i] if i < len(classes) else str(i) for i in range(len(counts))]
    cells: Any = [[names[i], names[k], int(counts[i, k])] for i, k in zip(*counts.nonzero(), strict=True)]
    return wandb.plot_table(
        vega_spec_name=CONFUSION_CHART,
        data_table=wandb.Table(columns=[*CONFUSION_COLUMNS], data=cells),
        fields={name: name for name in CONFUSION_COLUMNS},
        string_fields={"title": title},
    )
