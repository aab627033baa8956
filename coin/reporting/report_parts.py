"""What a report collects of experiments' files before anything is drawn: tables of text, counts, images, commands."""

import base64
import io
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from coin.files.yaml import as_text
from coin.reporting.extras import LAYERS_CSV, PROMISE_CSV, RISK_CSV, read_examples, read_promises, read_risk
from coin.reporting.findings import FLOOR, Entry, Findings
from coin.reporting.results import RESULTS_CSV, Counts, read_confusions, requested_policy
from coin.reporting.sources import ReportSource, as_dict
from coin.reporting.summary import SUMMARY_CSV, expert_accuracies, largest_samples, variant_names
from coin.reporting.sweeps import SWEEP_CSV, SWEEP_YAML
from coin.reporting.tables import percent, promise_table, risk_table, risk_totals

Titled = tuple[str, pd.DataFrame]
"""A table of text and what stands above it."""
REPORT_HTML = "report.html"


def data_url(kind: str, content: bytes) -> str:
    """Return a file's content as an address within the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def experts_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the experts' own accuracies; experiments that share their experts share a line."""
    experts = expert_accuracies(summary)
    experts["test accuracy (%)"] = [percent(row["mean"], row["spread"]) for row in _records(experts)]
    keys = ["task", "test accuracy (%)", "seeds"]
    table = experts.groupby(keys, sort=False)["experiment"].agg(", ".join).reset_index().astype(str)
    return table if experts["experiment"].nunique() > 1 else table[keys]


def accuracy_by_task(summary: pd.DataFrame, found: Findings) -> Iterator[Titled]:
    """Return the expert's accuracy, the decoded accuracy and the agreement of every task with the best decoder."""
    best = found.best or found.roles.get(FLOOR)
    if best is None:
        return
    alone = (summary["erased"] == summary["task"]) & (summary["decoder"] == best.decoder)
    rows = largest_samples(summary[alone & (summary["method"] != "oracle")])
    own = {f"{row['task']}: decoded": percent(row["mean"], row["spread"]) for row in _records(expert_accuracies(rows))}
    lines: dict[str, dict[str, str]] = {"the expert itself": own}
    for name, row in zip(variant_names(rows), _records(rows), strict=True):
        line = lines.setdefault(name, {})
        for what, column in (("decoded", "decoded_accuracy"), ("agreement", "agreement")):
            line[f"{row['task']}: {what}"] = percent(row[f"{column}_mean"], row[f"{column}_std"])
    table = pd.DataFrame([{"method": name, **line} for name, line in lines.items()]).fillna("–")
    yield f"Accuracy of the decoded answers, and agreement with the expert, in %, {best.decoder} decoder", table


def choices(source: ReportSource) -> Iterator[Titled]:
    """Return what every method chose, without the errors that it was chosen by."""
    made = pd.DataFrame([(each.get("label"), each.get("batchnorm")) for each in source.methods]).astype(str)
    if made.empty:
        return
    named = made.set_axis(["method", "batchnorm"], axis=1).assign(code_row="", layer="")
    lines: dict[str, dict[str, dict[str, None]]] = {}
    for name, each in zip(variant_names(named), source.methods, strict=True):
        for option, value in as_dict(each.get("chosen")).items():
            if not isinstance(value, dict):
                text = f"{value:.3g}" if isinstance(value, float) else as_text(value)
                lines.setdefault(name, {}).setdefault(option, {})[text] = None
    said = [(name, "; ".join(f"{option}: {', '.join(v)}" for option, v in own.items())) for name, own in lines.items()]
    if said:
        yield "", pd.DataFrame(said, columns=["method", "chosen"])


def keys_of_shown(source: ReportSource, best: Entry) -> dict[str, str]:
    """Return the keys in ``confusion.npz`` of the best method and of COIN, both with the best method's decoder."""
    frame = source.frame[source.frame["decoder"] == best.decoder].assign(name=variant_names)
    rows = [*_records(frame[frame["name"] == best.name])[:1], *_records(frame[frame["method"] == "coin"])[:1]]
    return {str(row["name"]): f"{row['method']}|{requested_policy(row['batchnorm'])}|{best.decoder}" for row in rows}


def risks(source: ReportSource, decoder: str) -> tuple[pd.DataFrame, list[Titled]]:
    """Return a decoder's `risk_totals`, and the tables of its risks and promises; both empty where there are none."""
    if not (read := list(source.read(read_risk))):
        return pd.DataFrame(), []
    totals = risk_totals(pd.concat(read, ignore_index=True))
    totals = totals[(totals["decoder"] == decoder) & (totals["name"] != "oracle")]
    title = f"Agreement with the expert, and accuracy, of the answers kept, in %, {decoder} decoder"
    tables = [(title, risk_table(totals))]
    if made := list(source.read(read_promises)):
        promises = pd.concat(made, ignore_index=True)
        promises = promises[(promises["decoder"] == decoder) & (promises["method"] != "oracle")]
        tables.append((f"Promised and found on the test sets, in %, {decoder} decoder", promise_table(promises)))
    return totals, tables


def confusions(source: ReportSource, keys: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Counts], list[str]]]:
    """Yield every task with its counts ``[C, C]`` over all seeds by method, `keys_of_shown`, and C names of classes."""
    archives = [read_confusions(seed) for seed in source.seeds]
    for task in dict.fromkeys(source.frame["task"]):
        counts = {}
        for name, key in keys.items():
            own = [archive[f"{key}|{task}|{task}"] for archive in archives if f"{key}|{task}|{task}" in archive]
            if own and len({each.shape for each in own}) == 1:
                counts[name] = np.sum(own, axis=0)
        if counts:
            size = len(next(iter(counts.values())))
            classes = as_dict(source.document.get("classes")).get(task) or []
            yield task, counts, [str(name) for name in (classes if len(classes) == size else range(size))]


def training_logs(source: ReportSource) -> list[pd.DataFrame]:
    """Return every expert's accuracy by epoch, in training and in validation, as far as it was logged."""
    columns, logged = ["epoch", "train/accuracy", "val/accuracy"], []
    for task in dict.fromkeys(source.frame["task"]):
        for seed in source.seeds:
            with suppress(OSError, ValueError, KeyError):  # a log, no result: it may be of another kind of training
                log = pd.read_csv(seed / "experts" / task / "logs" / "metrics.csv")[columns]
                logged.append(log.assign(task=task, seed=seed.name))
    return logged


def example_images(source: ReportSource, decoder: str, keys: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the example images by task, each with what the expert and the methods of `keys_of_shown` answer."""
    if (examples := next(source.read(read_examples), None)) is None:
        return
    decoded = {name: examples.decoded[key] for name, key in keys.items() if key in examples.decoded}
    for task, indices in examples.by_task().items():
        images, differ = [], dict.fromkeys(decoded, 0)
        for i in indices:
            buffer = io.BytesIO()
            Image.fromarray(examples.images[i]).save(buffer, format="PNG", optimize=True)
            answers = [("expert", examples.name_of(int(examples.expert[i])), False)]
            for name, own in decoded.items():
                differ[name] += int(own[i] != examples.expert[i])
                answers.append((name, examples.name_of(int(own[i])), bool(own[i] != examples.expert[i])))
            label = examples.name_of(int(examples.label[i]))
            images.append({"image": data_url("image/png", buffer.getvalue()), "label": label, "answers": answers})
        said = ", ".join(f"{count} of {len(indices)} for {name}" for name, count in differ.items())
        text = f"A random draw of the test set, the same for all methods, {decoder} decoder. "
        text += f"Answers that differ from the expert's: {said}."
        yield {"title": f"Task {task} lost" if task else "", "text": text, "images": images}


def command(source: ReportSource, page: Path, *, alone: bool) -> dict[str, Any]:
    """Return the command, which reads a file that the page itself hands out, and the files beside the page."""
    if source.sweep is not None:
        name, path = f"{source.sweep.name}.yaml", source.folder / SWEEP_YAML
        words = ["coin", "sweep", name]
    else:
        own = source.document["configuration"].get("name") or source.folder.resolve().name
        name, path = f"{own}.yaml", source.seeds[0] / "config.yaml"
        seeds = ",".join(str(seed) for seed in sorted(set(source.frame["seed"])))
        words = ["coin", "run", "-c", name, f"--seeds=[{seeds}]", "--output=runs"]
    files = [source.folder / own for own in (SUMMARY_CSV, SWEEP_CSV, *([] if alone else [REPORT_HTML]))]
    files += [seed / file for seed in source.seeds for file in (RESULTS_CSV, RISK_CSV, PROMISE_CSV, LAYERS_CSV)]
    versions = as_dict(source.document.get("versions"))
    return {
        "title": "" if alone else source.name,
        "command": shlex.join(words),
        "name": name,
        "config": data_url("text/yaml", path.read_bytes()) if path.is_file() else "",
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
        "json": json.dumps(source.document["configuration"], indent=2, ensure_ascii=False),
        "files": [os.path.relpath(file.resolve(), page.parent.resolve()) for file in files if file.is_file()],
        "wandb": url if (url := str(source.document.get("wandb"))).startswith("http") else "",
        "offline": any(True for seed in source.seeds for _ in seed.glob("wandb/offline-run-*")),
    }


def _records(frame: pd.DataFrame) -> list[dict[Any, Any]]:
    return frame.to_dict("records")
