"""What a report is made from: the folders of experiments, of single seeds or of sweeps, read once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from coin.errors import FileError
from coin.reporting.comparison import REFERENCES, variant_names
from coin.reporting.extras import Examples, read_examples, read_layers
from coin.reporting.results import RESULTS_CSV, Counts, confusion_key, read_configuration, read_confusions, read_results
from coin.reporting.summary import seed_folders
from coin.reporting.sweeps import SWEEP_CSV, Sweep, SweptGroup, read_sweep_table


@dataclass(frozen=True)
class Source:
    """One experiment's files, or those of a sweep's points that differ in nothing but seeds and P.

    Args:
        folder: As it was given.
        seeds: The folders that hold results; of a sweep, those of the largest P. They may be gone.
        frame: All rows of ``results.csv``; ``experiment`` is made unique among the report's sources.
        document: ``results.json`` of the first seed.
        confusions: (decoder, task) → variant → counts ``[C, C]`` summed over seeds, for tasks lost alone.
        layers: ``layers.csv`` of the first seed that has one.
        examples: ``examples.npz`` of the first seed that has one.
        sweep: The sweep that this is a part of.
        group: Which part of it.
    """

    folder: Path
    seeds: tuple[Path, ...]
    frame: pd.DataFrame
    document: dict[str, Any]
    confusions: dict[tuple[str, str], dict[str, Counts]]
    layers: pd.DataFrame | None
    examples: Examples | None
    sweep: Sweep | None = None
    group: SweptGroup | None = None

    @property
    def name(self) -> str:
        """The experiment's name in the report."""
        return str(self.frame["experiment"].iloc[0])

    @property
    def is_point(self) -> bool:
        """Whether this is one of several parts of a sweep, which are shown side by side rather than one by one."""
        return self.sweep is not None and len(self.sweep.groups) > 1


def read_sources(folders: Sequence[Path]) -> list[Source]:
    """Read experiments' folders (with ``seed-*``), single seeds' folders or sweeps' folders (with ``sweep.csv``).

    Experiments of one name are told apart by their folders.

    Raises:
        FileError: No folder is given, one holds no results, or a file is damaged.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    if not unique:
        raise FileError("found no folder to report on, expected at least one; `coin report runs/NAME`")
    found = [source for folder in unique for source in _read(folder, alone=len(unique) == 1)]
    names = [source.name for source in found]
    return [
        source if names.count(name) == 1 else _renamed(source, f"{name} ({source.folder})")
        for source, name in zip(found, names, strict=True)
    ]


def by_folder(sources: Sequence[Source]) -> list[list[Source]]:
    """Return the sources of each folder: one of an experiment, one or several of a sweep."""
    return [
        [source for source in sources if source.folder == folder]
        for folder in dict.fromkeys(source.folder for source in sources)
    ]


def _read(folder: Path, *, alone: bool) -> list[Source]:
    sweep = read_sweep_table(folder)
    if sweep is not None:
        return [_swept(folder, sweep, group, alone=alone) for group in sweep.groups]
    if (folder / RESULTS_CSV).is_file():
        return [_source(folder, (folder,), read_results(folder))]
    seeds = tuple(seed_folders(folder))
    if not seeds:
        raise FileError(
            f"found neither '{RESULTS_CSV}' nor 'seed-*/{RESULTS_CSV}' nor '{SWEEP_CSV}' in '{folder}', expected the "
            "folder of an experiment, of one seed or of a sweep; make it with `coin run` or `coin sweep`"
        )
    return [_source(folder, seeds, pd.concat([read_results(seed) for seed in seeds], ignore_index=True))]


def _swept(folder: Path, sweep: Sweep, group: SweptGroup, *, alone: bool) -> Source:
    largest = group.frame[group.frame["samples_per_task"] == group.frame["samples_per_task"].max()]
    points = [folder / name for name in dict.fromkeys(largest["experiment"])]
    seeds = tuple(seed for point in points for seed in sorted(point.glob("seed-*")) if (seed / RESULTS_CSV).is_file())
    name = " ".join([*([] if alone and group.label else [sweep.name]), *([group.label] if group.label else [])])
    return replace(_renamed(_source(folder, seeds, group.frame), name), sweep=sweep, group=group)


def _source(folder: Path, seeds: tuple[Path, ...], frame: pd.DataFrame) -> Source:
    return Source(
        folder=folder,
        seeds=seeds,
        frame=frame,
        document=read_configuration(seeds[0]) if seeds else {"configuration": {}},
        confusions=_confusions(seeds, frame),
        layers=next((found for found in map(read_layers, seeds) if found is not None), None),
        examples=next((found for found in map(read_examples, seeds) if found is not None), None),
    )


def _renamed(source: Source, name: str) -> Source:
    return replace(source, frame=source.frame.assign(experiment=name))


def _confusions(seeds: Sequence[Path], frame: pd.DataFrame) -> dict[tuple[str, str], dict[str, Counts]]:
    alone = frame[(frame["erased"] == frame["task"]) & ~frame["method"].isin(REFERENCES)]
    names = variant_names(frame)
    rows: Iterable[Any] = alone.itertuples()
    wanted = {confusion_key(row): (row.decoder, row.task, names[row.Index]) for row in rows}
    total: dict[tuple[str, str], dict[str, Counts]] = {}
    archives = [read_confusions(seed) for seed in seeds]
    for key, (decoder, task, name) in wanted.items():
        found = [archive[key] for archive in archives if key in archive]
        if found and len({counts.shape for counts in found}) == 1:
            total.setdefault((decoder, task), {})[str(name)] = np.sum(found, axis=0)
    return total
