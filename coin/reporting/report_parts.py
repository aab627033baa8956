"""What a report is of, and what it shows of it before anything is drawn: facts, tables of text, counts, images."""

import base64
import io
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from coin.files.yaml import as_text
from coin.reporting.extras import PROMISE_CSV, read_examples, read_promises
from coin.reporting.headline import Entry
from coin.reporting.results import RESULTS_CSV, check_current, read_configuration, requested_policy
from coin.reporting.summary import REFERENCES, SUMMARY_CSV, expert_accuracies, read_run, variant_names
from coin.reporting.sweeps import SWEEP_CSV, SWEEP_YAML, Sweep, read_sweep_table
from coin.reporting.tables import promise_table
from coin.reporting.text import percent

Titled = tuple[str, pd.DataFrame]  # what stands above a table of text, and the table
REPORT_HTML = "report.html"


@dataclass(frozen=True)
class Source:
    """All rows of a folder, the `seeds`' folders that hold results, and ``results.json`` of each of these."""

    folder: Path
    seeds: tuple[Path, ...]
    frame: pd.DataFrame
    documents: tuple[dict[str, Any], ...]
    sweep: Sweep | None = None

    @property
    def first(self) -> dict[str, Any]:
        """The first seed's document; nothing where the points of a sweep are gone."""
        return self.documents[0] if self.documents else {"configuration": {}}

    @property
    def made(self) -> list[dict[str, Any]]:
        """What the coded models of all seeds say of their making."""
        return [as_dict(made) for document in self.documents for made in document.get("methods") or ()]


def read_source(folder: Path) -> Source:
    """Read the folder of an experiment, of one seed, or of a sweep (with ``sweep.csv``); raises as `read_run`."""
    if sweep := read_sweep_table(folder):
        files = (sorted((folder / point).glob(f"seed-*/{RESULTS_CSV}")) for point in sweep.points)
        seeds, frame = [file.parent for own in files for file in own], sweep.frame
        for seed in seeds:
            check_current(seed)
    else:
        seeds, frame = read_run(folder)
    return Source(folder, tuple(seeds), frame, tuple(map(read_configuration, seeds)), sweep)


def facts_of(source: Source) -> dict[str, str]:
    """Return what was run, in words; what the results do not say is left out."""
    frame, configuration = source.frame, source.first["configuration"]
    network, base = as_dict(configuration.get("network")), as_dict(configuration.get("base"))
    tasks = {task: as_dict(as_dict(configuration.get("tasks")).get(task)) for task in dict.fromkeys(frame["task"])}
    kinds = {task: given.get("class") or given.get("class_path") for task, given in tasks.items()}
    found = {
        "tasks": ", ".join(f"{task} ({kind.rpartition('.')[2]})" if kind else task for task, kind in kinds.items()),
        "network": f"{network['name']}, inputs of size {network.get('image_size')}" if network.get("name") else "",
        "starts from": str(base.get("checkpoint") or ("a base trained beforehand" if base else network.get("weights"))),
        "code": as_text(code) if (code := configuration.get("code")) else "",
        "P, calibration samples per task": ", ".join(map(str, sorted(set(frame["samples_per_task"])))),
        "methods": ", ".join(dict.fromkeys(frame.loc[~frame["method"].isin(REFERENCES), "method"])),
        "decoders": ", ".join(dict.fromkeys(frame["decoder"])),
        "seeds": ", ".join(map(str, sorted(set(frame["seed"])))),
        "date": str(source.first.get("date") or "")[:16].replace("T", " "),
        "machine": str(source.first.get("machine") or ""),
    }
    found |= {f"swept: {name}": ", ".join(v) for name, v in (source.sweep.swept.items() if source.sweep else ())}
    return {name: text for name, text in found.items() if text not in ("", "None")}


def data_url(kind: str, content: bytes) -> str:
    """Return a file's content as an address within the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def experts_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the experts' own accuracies; experiments of a sweep that share their experts share a line."""
    experts = expert_accuracies(summary)
    experts["test accuracy (%)"] = [percent(row["mean"], row["spread"]) for row in experts.to_dict("records")]
    keys = ["task", "test accuracy (%)", "seeds"]
    table = experts.groupby(keys, sort=False)["experiment"].agg(", ".join).reset_index().astype(str)
    return table if experts["experiment"].nunique() > 1 else table[keys]


def by_task(summary: pd.DataFrame, source: Source, decoder: str) -> Iterator[Titled]:
    """Yield the accuracy and agreement of every task with a decoder, and what is promised of it if anything is."""
    alone = (summary["erased"] == summary["task"]) & (summary["decoder"] == decoder)
    rows = summary[alone & (summary["method"] != "oracle")]
    experts = expert_accuracies(rows).to_dict("records")
    own = {f"{row['task']}: decoded": percent(row["mean"], row["spread"]) for row in experts}
    lines: dict[str, dict[str, str]] = {"the expert itself": own}
    for name, row in zip(variant_names(rows), rows.to_dict("records"), strict=True):
        line = lines.setdefault(name, {})
        for what, column in (("decoded", "decoded_accuracy"), ("agreement", "agreement")):
            line[f"{row['task']}: {what}"] = percent(row[f"{column}_mean"], row[f"{column}_std"])
    table = pd.DataFrame([{"method": name, **line} for name, line in lines.items()]).fillna("–")
    yield f"Accuracy of the decoded answers, and agreement with the expert, in %, {decoder} decoder", table
    if made := [found for found in map(read_promises, source.seeds) if found is not None]:
        promised = pd.concat(made, ignore_index=True)
        promised = promised[(promised["decoder"] == decoder) & (promised["method"] != "oracle")]
        yield f"Promised and found on the test sets, in %, {decoder} decoder", promise_table(promised)


def choices(source: Source) -> pd.DataFrame:
    """Return what every method chose, without the errors that it was chosen by."""
    lines: dict[str, dict[str, dict[str, None]]] = {}
    for made in source.made:
        for option, value in as_dict(made.get("chosen")).items():
            if not isinstance(value, dict):
                text = f"{value:.3g}" if isinstance(value, float) else as_text(value)
                lines.setdefault(str(made.get("label")), {}).setdefault(option, {})[text] = None
    said = [(name, "; ".join(f"{option}: {', '.join(v)}" for option, v in own.items())) for name, own in lines.items()]
    return pd.DataFrame(said, columns=["method", "chosen"])


def example_images(source: Source, best: Entry) -> Iterator[dict[str, Any]]:
    """Yield the example images by task, with what the expert, the best method and COIN answer by its decoder."""
    if (examples := next(filter(None, map(read_examples, source.seeds)), None)) is None:
        return
    frame = source.frame[source.frame["decoder"] == best.decoder].assign(name=variant_names)
    rows = pd.concat([frame[frame["name"] == best.name].head(1), frame[frame["method"] == "coin"].head(1)])
    keys = rows["method"] + "|" + rows["batchnorm"].map(requested_policy) + f"|{best.decoder}"
    known = examples.decoded
    decoded = {name: known[key] for name, key in zip(rows["name"], keys, strict=True) if key in known}
    for task, indices in examples.by_task().items():
        images = []
        for i in indices:
            buffer = io.BytesIO()
            Image.fromarray(examples.images[i]).save(buffer, format="PNG", optimize=True)
            answers = [
                (name, examples.names[own[i]], bool(own[i] != examples.expert[i]))
                for name, own in {"expert": examples.expert, **decoded}.items()
            ]
            label = examples.names[examples.label[i]]
            images.append({"image": data_url("image/png", buffer.getvalue()), "label": label, "answers": answers})
        differ = {name: int((own[indices] != examples.expert[indices]).sum()) for name, own in decoded.items()}
        said = ", ".join(f"{count} of {len(indices)} for {name}" for name, count in differ.items())
        text = f"A random draw of the test set, the same for all. Answers that differ from the expert's: {said}."
        yield {"title": f"Task {task} lost", "text": text, "images": images}


def command(source: Source, page: Path) -> dict[str, Any]:
    """Return the command, which reads a file that the page itself hands out, and the files beside the page."""
    if source.sweep is not None:
        name, path = f"{source.sweep.name}.yaml", source.folder / SWEEP_YAML
        words = ["coin", "sweep", name]
    else:
        name, path = f"{source.frame['experiment'].iloc[0]}.yaml", source.seeds[0] / "config.yaml"
        seeds = ",".join(map(str, sorted(set(source.frame["seed"]))))
        words = ["coin", "run", "-c", name, f"--seeds=[{seeds}]", "--output=runs"]
    files = [source.folder / own for own in (SUMMARY_CSV, SWEEP_CSV)]
    files += [seed / file for seed in source.seeds for file in (RESULTS_CSV, PROMISE_CSV)]
    versions = as_dict(source.first.get("versions")).items()
    return {
        "command": shlex.join(words),
        "name": name,
        "config": data_url("text/yaml", path.read_bytes()) if path.is_file() else "",
        "versions": ", ".join(f"{package} {version}" for package, version in versions),
        "json": json.dumps(source.first["configuration"], indent=2, ensure_ascii=False),
        "files": [os.path.relpath(file.absolute(), page.parent.absolute()) for file in files if file.is_file()],
        "wandb": url if (url := str(source.first.get("wandb"))).startswith("http") else "",
        "offline": any(any(seed.glob("wandb/offline-run-*")) for seed in source.seeds),
    }


def as_dict(value: object) -> dict[str, Any]:
    """Return a value of ``results.json`` that should be a section, or an empty one."""
    return value if isinstance(value, dict) else {}
