"""What a report is of: folders of experiments, seeds and sweeps, read as a whole."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from coin.errors import FileError
from coin.reporting.results import RESULTS_CSV, read_configuration
from coin.reporting.summary import REFERENCES, read_run
from coin.reporting.sweeps import Sweep, read_sweep_table, short_value

Found = TypeVar("Found")


@dataclass(frozen=True)
class ReportSource:
    """A folder of an experiment, a seed or a sweep: all its rows, and ``results.json`` of its first seed.

    ``experiment`` is unique among the sources of a report. ``seeds`` are those folders that hold results; of a sweep,
    those of the largest P, which may be gone. ``methods`` is what the coded models of all seeds say of their making.
    """

    folder: Path
    seeds: tuple[Path, ...]
    frame: pd.DataFrame
    document: dict[str, Any]
    methods: tuple[dict[str, Any], ...]
    sweep: Sweep | None = None

    @property
    def name(self) -> str:
        """What the source is called."""
        return str(self.frame["experiment"].iloc[0]) if self.sweep is None else f"sweep {self.sweep.name}"

    @property
    def names(self) -> list[str]:
        """Its experiments: one, or several of a sweep."""
        return list(dict.fromkeys(self.frame["experiment"]))

    @property
    def options(self) -> dict[str, Mapping[str, str]]:
        """What the options of a sweep's experiments are."""
        return dict(zip(self.names, self.sweep.options.values(), strict=True)) if self.sweep else {}

    def read(self, reader: Callable[[Path], Found | None]) -> Iterator[Found]:
        """Yield what a reader of an optional file returns for the seeds' folders that have one."""
        return (found for found in map(reader, self.seeds) if found is not None)

    @property
    def kinds(self) -> dict[str, str]:
        """What every label is: the method's own name, where the results say it."""
        return {str(made.get("label")): str(made["method"]) for made in self.methods if made.get("method")}


def read_sources(folders: Sequence[Path]) -> list[ReportSource]:
    """Read experiments' folders (with ``seed-*``), single seeds' folders or sweeps' folders (with ``sweep.csv``).

    Experiments of the same name are distinguished by their folders, those of a sweep by the sweep's name. Raises
    FileError where no folder is given, one holds no results, or a file is damaged.
    """
    unique = {folder.resolve(): folder for folder in folders}
    if not unique:
        raise FileError("found no folder to report on, expected at least one; `coin report runs/NAME`")
    found = [_read(folder) for folder in unique.values()]
    names = [source.name for source in found]
    for name, source in zip(names, found, strict=True):
        if source.sweep is not None and len(found) > 1:
            own: Any = source.frame["experiment"]
            source.frame["experiment"] = own.where(own == source.sweep.name, f"{source.sweep.name} " + own)
        elif names.count(name) > 1:
            source.frame["experiment"] = f"{name} ({source.folder})"
    return found


def _read(folder: Path) -> ReportSource:
    sweep = read_sweep_table(folder)
    if sweep is not None:
        found = (seed for point in sweep.points for seed in sorted((folder / point).glob("seed-*")))
        seeds, frame = [seed for seed in found if (seed / RESULTS_CSV).is_file()], sweep.frame
    else:
        found_seeds, frame = read_run(folder)
        seeds = found_seeds
    documents = [read_configuration(seed) for seed in seeds] or [{"configuration": {}}]
    methods = tuple(as_dict(made) for document in documents for made in document.get("methods") or ())
    return ReportSource(folder, tuple(seeds), frame, documents[0], methods, sweep)


def facts_of(source: ReportSource) -> dict[str, str]:
    """Return what was run, in words; what the results do not say is left out."""
    frame, configuration = source.frame, source.document["configuration"]
    network, base = as_dict(configuration.get("network")), as_dict(configuration.get("base"))
    tasks = []
    for task in dict.fromkeys(frame["task"]):
        given = as_dict(as_dict(configuration.get("tasks")).get(task))
        kind = given.get("class") or str(given.get("class_path") or "").rpartition(".")[2]
        tasks.append(f"{task} ({kind})" if kind else task)
    weights = base.get("checkpoint") or ("a base trained beforehand" if base else network.get("weights"))
    code = [f"[{', '.join(f'{weight:.3g}' for weight in row)}]" for row in configuration.get("code") or ()]
    size = network.get("image_size")
    reads = f"texts of {size} tokens" if network.get("name") == "minilm" else f"images of {size} pixels"
    swept = [
        f"{name}: {', '.join(dict.fromkeys(text for v in values for text in (short_value(v, values), v)))}"
        for name, values in (source.sweep.swept.items() if source.sweep else ())
        if len(values) > 1
    ]
    found = {
        "tasks": ", ".join(tasks),
        "network": f"{network['name']}, {reads}" if network.get("name") else "",
        "starts from": str(weights or "random weights") if network else "",
        "code": f"[{', '.join(code)}]" if code else "",
        "P, calibration samples per task": ", ".join(map(str, sorted(set(frame["samples_per_task"])))),
        "methods": ", ".join(dict.fromkeys(frame.loc[~frame["method"].isin(REFERENCES), "method"])),
        "decoders": ", ".join(dict.fromkeys(frame["decoder"])),
        "seeds": ", ".join(map(str, sorted(set(frame["seed"])))),
        "swept": "; ".join(swept),
        "date": str(source.document.get("date") or "")[:16].replace("T", " "),
        "machine": str(source.document.get("machine") or ""),
    }
    return {name: text for name, text in found.items() if text}


def as_dict(value: object) -> dict[str, Any]:
    """Return a value of ``results.json`` that should be a section, or an empty one."""
    return value if isinstance(value, dict) else {}
