"""The report's sections in words: what was run, what the numbers say, how to do it again."""

import json
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from coin.reporting import markup
from coin.reporting.findings import Finding
from coin.reporting.sources import Source
from coin.reporting.sweeps import SWEEP_YAML


def facts(parts: Sequence[Sequence[Source]]) -> str:
    """Return what was run as a table: a line per fact, a column per experiment or sweep.

    Args:
        parts: The sources of each folder.
    """
    columns = [_facts(sources) for sources in parts]
    lines = list(dict.fromkeys(name for column in columns for name in column))
    rows = [
        markup.row([markup.cell(name), *(markup.cell(column.get(name, "–"), "text wrap") for column in columns)])
        for name in lines
    ]
    names = [_title(sources) for sources in parts]
    return markup.table(["", *names], rows, text_columns=names, kind="facts")


def findings_list(found: Iterable[Finding]) -> str:
    """Return findings as a list; a word says what the colour does."""
    items = [f'<li class="{item.kind}"><b>{item.kind}</b>{escape(item.text)}</li>' for item in found]
    return f'<ul class="findings">{"".join(items)}</ul>' if items else ""


def choices(source: Source) -> str:
    """Return a table of what the methods chose on held-out samples and how their solves ended, in the first seed."""
    rows = []
    for method in source.document.get("methods", []):
        chosen = method.get("chosen") or {}
        plain = {name: value for name, value in chosen.items() if not isinstance(value, dict)}
        said = ", ".join(f"{name} {_said(value)}" for name, value in plain.items() if value not in ("", []))
        if said:
            rows.append(markup.row([markup.cell(str(method["label"])), markup.cell(said, "text wrap")]))
    seed = f"In {source.seeds[0].name}. " if len(source.seeds) > 1 else ""
    note = f'<p class="soft">{escape(seed)}All of it is in results.json, with the residuals that decided.</p>'
    return markup.table(["method", "what was chosen"], rows, ["method", "what was chosen"]) + note if rows else ""


def _said(value: object) -> str:
    if isinstance(value, list):
        return f"{len(value)} tensors ({', '.join(map(str, value[:2]))}{', …' if len(value) > 2 else ''})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def reproduce(parts: Sequence[Sequence[Source]]) -> str:
    """Return the command, the versions and the configuration of every experiment or sweep."""
    out = []
    for sources in parts:
        source = sources[0]
        document = source.document
        versions = document.get("versions")
        named = versions.items() if isinstance(versions, dict) else ()
        versioned = ", ".join(f"{name} {value}" for name, value in named)
        configuration = json.dumps(document["configuration"], indent=2, ensure_ascii=False)
        where = f" ({source.seeds[0]})" if source.seeds else ""
        out.append(
            (f"<h3>{escape(_title(sources))}</h3>" if len(parts) > 1 else "")
            + f"<pre>{escape(_command(sources))}</pre>"
            + (f'<p class="soft">With {escape(versioned)}.</p>' if versioned else "")
            + markup.folded(f"Configuration{where}", f"<pre>{escape(configuration)}</pre>")
        )
    return "".join(out)


def _title(sources: Sequence[Source]) -> str:
    sweep = sources[0].sweep
    return sources[0].name if sweep is None else sweep.name


def _command(sources: Sequence[Source]) -> str:
    """Return the command line that does it again."""
    source = sources[0]
    if source.sweep is not None:
        file = source.folder / SWEEP_YAML
        return shlex.join(["coin", "sweep", str(file) if file.is_file() else "SWEEP.yaml"])
    config = source.seeds[0] / "config.yaml"
    command = ["coin", "run", "--config", str(config) if config.is_file() else "EXPERIMENT.yaml"]
    if len(source.seeds) > 1:
        command.append(
            f"--seeds={json.dumps(sorted({int(seed) for seed in source.frame['seed']}), separators=(',', ':'))}"
        )
    return shlex.join(command)


def _facts(sources: Sequence[Source]) -> dict[str, str]:
    frame = pd.concat([source.frame for source in sources], ignore_index=True)
    configuration = sources[0].document["configuration"]
    methods = list(dict.fromkeys(frame.loc[~frame["method"].isin(("none", "oracle")), "method"]))
    network = _lookup(configuration, "network")
    seeds = sorted(set(frame["seed"]))
    found = {
        "tasks": _tasks(frame, _lookup(configuration, "tasks")),
        "network": _network(network),
        "starts from": _start(configuration),
        "code": _code(sources[0]),
        "P, calibration samples per task": ", ".join(str(value) for value in sorted(set(frame["samples_per_task"]))),
        "methods": f"{len(methods)}: {', '.join(methods)}",
        "decoders": ", ".join(dict.fromkeys(frame["decoder"])),
        "seeds": ", ".join(str(seed) for seed in seeds),
    }
    sweep = sources[0].sweep
    if sweep is not None:
        swept = (f"{name}: {', '.join(values)}" for name, values in sweep.swept.items() if len(values) > 1)
        found["swept"] = "; ".join(swept)
    return {name: text for name, text in found.items() if text}


def _network(network: object) -> str:
    """Return the network and what it reads in words; nothing where the results do not say."""
    name, size = _lookup(network, "name"), _lookup(network, "image_size")
    if not name:
        return ""
    return f"{name}, " + (f"texts of {size} tokens" if name == "minilm" else f"images of {size} pixels")


def _tasks(frame: pd.DataFrame, options: object) -> str:
    """Return the tasks, each with where its images come from."""
    named = []
    for task in dict.fromkeys(frame["task"]):
        given = _lookup(options, task)
        kind = _lookup(given, "class") or str(_lookup(given, "class_path") or "").rpartition(".")[2]
        root = _lookup(given, "root")
        inside = ", ".join([str(kind), *([Path(str(root)).name] if kind == "ImageFolder" and root else [])])
        named.append(f"{task} ({inside})" if kind else str(task))
    return ", ".join(named)


def _start(configuration: object) -> str:
    """Return the shared initialisation in words; nothing where the results do not say."""
    base, network = _lookup(configuration, "base"), _lookup(configuration, "network")
    if isinstance(base, dict) and base.get("checkpoint"):
        return f"checkpoint {base['checkpoint']}"
    if isinstance(base, dict) and isinstance(base.get("task"), dict):
        task: dict[str, Any] = base["task"]
        return f"a base trained on {task.get('class', 'its task')}, epochs: {base.get('epochs')}"
    if not isinstance(network, dict) or "weights" not in network:
        return ""
    return "random weights" if network["weights"] is None else f"weights {network['weights']}"


def _code(source: Source) -> str:
    """Return the code in words; nothing where the results do not say."""
    configuration = source.document["configuration"]
    code, choice = _lookup(configuration, "code"), _lookup(configuration, "code_choice")
    if not isinstance(code, list) or not code:
        return ""
    rows = ", ".join(f"[{', '.join(f'{weight:.3g}' for weight in row)}]" for row in code)
    text = f"[{rows}]"
    return text if choice is None else f"{text}, chosen from the calibration data of {source.seeds[0].name}"


def _lookup(value: object, *keys: str) -> object:
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value
