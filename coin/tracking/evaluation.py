"""A seed's evaluation in W&B: numbers in the summary of its run, one table of all rows, few pictures."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import wandb
from PIL import Image

from coin.coding.decoder_config import REPLICA
from coin.reporting.extras import Examples
from coin.reporting.figures import nda_against_memory
from coin.reporting.results import COLUMNS, Counts, Row, confusion_key
from coin.reporting.style import as_png
from coin.reporting.summary import REFERENCES, over_tasks, stand_ins, summarise, variant_names
from coin.tracking.settings import CONFUSION_CHART, CONFUSION_COLUMNS, run_environment


def log_evaluation(
    run: wandb.Run,
    rows: Sequence[Row],
    confusions: Mapping[str, Counts],
    examples: Examples | None,
    classes: Mapping[str, Sequence[str]],
) -> None:
    """Log one seed's evaluation into an open run.

    The summary has ``nda/METHOD/DECODER``, means over tasks, each lost alone, and for W&B's sweeps ``nda_mean_best``
    (on the test sets: it ranks, it does not validate), with ``best_method``, ``best_decoder``, ``best_memory_mib`` and
    ``best_resident_mib``. The tables are ``results`` (all rows) and ``examples`` (test
    images with the best decoder's answers); ``confusion/TASK`` is a chart of the best method's counts ``[C, C]``.
    """
    if run.disabled:
        return
    frame = pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS))
    summary = summarise(frame)
    means = over_tasks(summary.assign(name=variant_names(summary))).dropna(subset="nda_mean")
    names = "nda/" + means["name"] + "/" + means["decoder"]
    numbers: dict[str, Any] = dict(zip(names, means["nda_mean"], strict=True))
    coded = means[~means["method"].isin(REFERENCES) & (means["decoder"] != REPLICA)].sort_values("nda_mean")
    if len(coded):
        best = coded.iloc[-1]
        numbers |= {"nda_mean_best": float(best.nda_mean), "best_method": best["name"], "best_decoder": best.decoder}
        memories = {"best_memory_mib": best.memory_mib_mean, "best_resident_mib": best.resident_mib_mean}
        numbers |= {name: float(mib) for name, mib in memories.items() if pd.notna(mib)}
    method, decoder = numbers.get("best_method"), numbers.get("best_decoder")
    cells: Any = frame.astype(object).where(frame.notna(), None)  # W&B's charts stumble over NaN
    logged: dict[str, Any] = {"results": wandb.Table(columns=[*COLUMNS], data=cells.to_numpy().tolist())}
    if ((kept := stand_ins(summary))["memory_mib"] > 0).any():
        picture = Image.open(io.BytesIO(as_png(nda_against_memory(kept), dpi=110)))
        logged["nda_against_memory"] = wandb.Image(picture)
    if examples is not None:
        logged["examples"] = _examples(examples, decoder)
    for row, name in zip(rows, variant_names(frame), strict=True):
        if (name, row.decoder) == (method, decoder) and row.erased == row.task:
            title = f"{name}, {row.decoder}: expert (actual) against decoded, {row.task} lost"
            logged[f"confusion/{row.task}"] = _confusion(confusions[confusion_key(row)], classes[row.task], title)
    with run_environment(Path(run.settings.root_dir)):
        run.log(logged)
    run.summary.update(numbers)


def _examples(examples: Examples, decoder: str | None) -> wandb.Table:
    """Return test images with the label, the expert's answer and every method's by one decoder."""
    decoded = {key.rpartition("|"): answers for key, answers in examples.decoded.items()}
    own = {name.strip("|"): answers for (name, _, by), answers in decoded.items() if by == decoder}
    shown = {"label": examples.label, "expert": examples.expert, **own}
    rows: Any = [
        [wandb.Image(image), task, *(examples.names[each[i]] for each in shown.values())]
        for i, (image, task) in enumerate(zip(examples.images, examples.task, strict=True))
    ]
    return wandb.Table(columns=["image", "task", *shown], data=rows)


def _confusion(counts: Counts, classes: Sequence[str], title: str) -> Any:
    """Return W&B's confusion chart, which `wandb.plot.confusion_matrix` makes of single predictions, of counts."""
    cells: Any = [[classes[i], classes[k], int(counts[i, k])] for i, k in zip(*counts.nonzero(), strict=True)]
    return wandb.plot_table(
        vega_spec_name=CONFUSION_CHART,
        data_table=wandb.Table(columns=[*CONFUSION_COLUMNS], data=cells),
        fields={name: name for name in CONFUSION_COLUMNS},
        string_fields={"title": title},
    )
