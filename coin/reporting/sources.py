"""What a report is made from: the folders of experiments or of single seeds, read once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from coin.errors import FileError
from coin.reporting.comparison import REFERENCES, variant_names
from coin.reporting.extras import Examples, read_examples, read_layers
from coin.reporting.results import RESULTS_CSV, Counts, confusion_key, read_configuration, read_confusions, read_results
from coin.reporting.summary import seed_folders


@dataclass(frozen=True)
class Source:
    """One experiment's files.

    Args:
        folder: As it was given.
        seeds: The folders that hold results.
        frame: All rows of ``results.csv``; ``experiment`` is made unique among the report's sources.
        document: ``results.json`` of the first seed.
        confusions: (decoder, task) → variant → counts ``[C, C]`` summed over seeds, for tasks lost alone.
        layers: ``layers.csv`` of the first seed that has one.
        examples: ``examples.npz`` of the first seed that has one.
    """

    folder: Path
    seeds: tuple[Path, ...]
    frame: pd.DataFrame
    document: dict[str, Any]
    confusions: dict[tuple[str, str], dict[str, Counts]]
    layers: pd.DataFrame | None
    examples: Examples | None

    @property
    def name(self) -> str:
        """The experiment's name in the report."""
        return str(self.frame["experiment"].iloc[0])


def read_sources(folders: Sequence[Path]) -> list[Source]:
    """Read experiment folders (with ``seed-*``) or single seeds' folders.

    Experiments of one name are told apart by their folders.

    Raises:
        FileError: No folder is given, one holds no results, or a file is damaged.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    if not unique:
        raise FileError("found no folder to report on, expected at least one; `coin report runs/NAME`")
    frames = [(folder, *_read_frame(folder)) for folder in unique]
    names = [frame["experiment"].iloc[0] for _, _, frame in frames]
    sources = []
    for (folder, seeds, frame), name in zip(frames, names, strict=True):
        own = name if names.count(name) == 1 else f"{name} ({folder})"
        frame = frame.assign(experiment=own)
        sources.append(
            Source(
                folder=folder,
                seeds=seeds,
                frame=frame,
                document=read_configuration(seeds[0]),
                confusions=_confusions(seeds, frame),
                layers=next((found for found in map(read_layers, seeds) if found is not None), None),
                examples=next((found for found in map(read_examples, seeds) if found is not None), None),
            )
        )
    return sources


def _read_frame(folder: Path) -> tuple[tuple[Path, ...], pd.DataFrame]:
    if (folder / RESULTS_CSV).is_file():
        return (folder,), read_results(folder)
    seeds = tuple(seed_folders(folder))
    if not seeds:
        raise FileError(
            f"found neither '{RESULTS_CSV}' nor 'seed-*/{RESULTS_CSV}' in '{folder}', expected the folder of an "
            f"experiment or of one seed; make it with `coin run`"
        )
    return seeds, pd.concat([read_results(seed) for seed in seeds], ignore_index=True)


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
