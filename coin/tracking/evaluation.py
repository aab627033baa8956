"""An evaluation in W&B: final numbers in the summaries of its runs, one table of all rows, few charts."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from coin.coding.decoder_config import REPLICA
from coin.reporting.extras import Examples
from coin.reporting.figures import nda_against_cost, nda_against_memory, risk_curves
from coin.reporting.results import COLUMNS, STAND_IN_COSTS, Counts, Row, confusion_key, requested_policy
from coin.reporting.style import as_png
from coin.reporting.summary import REFERENCES, largest_samples, over_tasks, stand_ins, summarise, variant_names
from coin.reporting.tables import risk_totals
from coin.tracking.runs import folder_of
from coin.tracking.settings import CONFUSION_CHART, CONFUSION_COLUMNS, run_environment

if TYPE_CHECKING:
    import wandb
    from matplotlib.figure import Figure


def log_evaluation(
    run: "wandb.Run",
    rows: Sequence[Row],
    confusions: Mapping[str, Counts] | None = None,
    examples: Examples | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
    risk: pd.DataFrame | None = None,
) -> None:
    """Log one seed's evaluation into an open run: `_log_overview`, and what is of the seed alone.

    That are the tables ``results`` (all rows), ``risk`` (as in ``risk.csv``) and ``examples`` (test images with the
    answers), the curves of the risk with the best decoder, and the `confusions` of the best method, counts ``[C, C]``
    by `confusion_key`, a chart a task with the names of its `classes`.
    """
    if run.disabled:
        return
    frame = pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS))
    summary = summarise(frame)
    found = best(summary)
    logged: dict[str, Any] = {"results": _table(frame)}
    if risk is not None:
        logged["risk"] = _table(risk)
        totals = risk_totals(risk)
        shown = totals[totals["decoder"] == found.get("best_decoder")]
        if len(shown):
            logged["figures/risk"] = _image(risk_curves(shown))
    if examples is not None:
        logged["examples"] = _examples(examples, found.get("best_decoder"))
    for row, name in zip(rows, variant_names(frame), strict=True):
        counts = (confusions or {}).get(confusion_key(row))
        if counts is not None and (name, row.decoder) == (found.get("best_method"), found.get("best_decoder")):
            title = f"{name}, {row.decoder}: expert (actual) against decoded, {row.task} lost"
            chart = _confusion(counts, (classes or {}).get(row.task, ()), title)
            logged[f"confusion/{row.erased}/{row.task}"] = chart
    _log_overview(run, summary, logged)


def log_method(run: "wandb.Run", rows: pd.DataFrame) -> None:
    """Write one method's numbers of one seed into the summary of its run: a dashboard can group runs by ``variant``.

    The summary has ``nda/<decoder>/<task>`` and ``…/mean``, likewise ``agreement`` and ``decoded_accuracy``; what
    making the coded model took, ``residual``, ``merge_seconds`` and ``merge_passes``; and ``seconds/<decoder>`` and
    ``passes/<decoder>``, the decoder's part included, and ``memory_mib/<decoder>``, ``forwards/…`` and ``losses/…``.
    The loss of several tasks stands before its task: ``nda/linear/a+b/a``, ``nda/linear/2-of-3/mean``. The
    configuration says what was measured: ``variant``, ``method``, ``batchnorm`` (the policy asked for),
    ``selected_batchnorm``.
    """
    first = rows.iloc[0]
    own = {
        "variant": variant_names(rows).iloc[0],
        "method": first["method"],
        "batchnorm": requested_policy(first["batchnorm"]),
        "selected_batchnorm": first["batchnorm"],
        "samples_per_task": int(first["samples_per_task"]),
    }
    config: Any = run.config
    config.update(own, allow_val_change=True)
    numbers: dict[str, float] = {}
    for row in summarise(rows).to_dict("records"):
        single = row["erased"] == row["task"] or row["erased"].startswith("1 of ")
        leaf = row["task"] if single else f"{row['erased'].replace(' of ', '-of-')}/{row['task']}"
        for name in ("nda", "agreement", "decoded_accuracy"):
            numbers[f"{name}/{row['decoder']}/{leaf}"] = row[f"{name}_mean"]
        if single and row["task"] == "mean":
            numbers |= {name: row[f"{name}_mean"] for name in ("residual", "merge_seconds", "merge_passes")}
            for unit in ("seconds", "passes"):
                numbers[f"{unit}/{row['decoder']}"] = row[f"merge_{unit}_mean"] + row[f"decoder_{unit}_mean"]
            numbers |= {f"{cost}/{row['decoder']}": row[f"{cost}_mean"] for cost in STAND_IN_COSTS}
    run.summary.update({name: number for name, number in numbers.items() if not math.isnan(number)})


def log_summary(run: "wandb.Run", summary: pd.DataFrame) -> None:
    """Log all seeds of an experiment together, what `coin.reporting.summarise` returns, as an overview and a table."""
    _log_overview(run, summary, {"summary": _table(summary)})


def best(summary: pd.DataFrame) -> dict[str, Any]:
    """Return the largest mean NDA over all coded models and decoders, and for each decoder; nothing without them."""
    means = over_tasks(summary.assign(name=variant_names(summary)))
    means = means[~means["method"].isin(REFERENCES) & (means["decoder"] != REPLICA) & means["nda_mean"].notna()]
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


def _log_overview(run: "wandb.Run", summary: pd.DataFrame, logged: dict[str, Any]) -> None:
    """Log NDA against memory and against cost as figures, what else is to be logged, and the summary's final numbers.

    The summary has ``nda/<method>/<decoder>/mean``, the means over tasks each lost alone; and, for sweeps,
    ``nda_mean/<decoder>`` (the best method's) and ``nda_mean_best`` with ``best_method`` and ``best_decoder``. The best
    is chosen on the test sets: it ranks, it does not validate.
    """
    means = over_tasks(summary.assign(name=variant_names(summary)))
    if not means["method"].isin(REFERENCES).all():
        logged["figures/nda_against_cost"] = _image(nda_against_cost(means))
        if len(kept := stand_ins(summary)):
            logged["figures/nda_against_memory"] = _image(nda_against_memory(kept))
    with run_environment(folder_of(run)):
        run.log(logged)
    means = largest_samples(means).dropna(subset="nda_mean")
    overview = {f"nda/{row['name']}/{row['decoder']}/mean": row["nda_mean"] for row in means.to_dict("records")}
    run.summary.update(overview | best(summary))


def _image(figure: "Figure") -> "wandb.Image":
    import wandb

    return wandb.Image(Image.open(io.BytesIO(as_png(figure, dpi=110))))


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
