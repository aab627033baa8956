"""The files of a measurement: its rows, what was run, confusion matrices and promises, written and read back."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from coin.core.versions import machine, versions
from coin.errors import FileError, first_line
from coin.files.atomic import atomic_path, how_to_redo, write_text

RESULTS_CSV = "results.csv"
RESULTS_JSON = "results.json"
CONFUSION_NPZ = "confusion.npz"
PROMISE_CSV = "promise.csv"

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One measured number set: one lost task, read out of one erasure by one decoder.

    Args:
        experiment: The experiment's name.
        seed: The seed of this run, for calibration samples and everything random after the base.
        method: The merge method's name or label; ``none`` for the survivors alone, ``oracle`` for Σβ_i f_i itself.
        batchnorm: The BatchNorm policy: ``auto:recalibrate`` where ``auto`` took that, ``auto:same`` where the experts
            agree, ``keep`` where statistics were frozen, joined by ``+``; ``""`` without BatchNorm or of own functions.
        decoder: The decoder's name, such as ``linear``.
        code_row: Indices of the coded models used, joined by ``+``; ``""`` for none.
        erased: The lost tasks, joined by ``+``.
        task: The lost task that this row scores, one of `erased`.
        samples_per_task: Calibration samples per task, P.
        expert_accuracy: Share of the task's test samples that the expert itself classifies correctly.
        decoded_accuracy: The same for the decoded output.
        nda: decoded_accuracy / expert_accuracy; NaN where the expert is never right.
        agreement: Share of test samples where expert and decoded output predict the same class.
        residual: ‖f_c − Σβ_i f_i‖ / ‖Σβ_i f_i‖; NaN where there is no coded model, or ``expert_head`` alone reads it.
        merge_seconds: Wall time of making the coded model: statistics, merging, training and tuning, in seconds.
        merge_passes: Forward-equivalents spent on it (forward 1, backward 2 per sample and cotangent).
        decoder_seconds: Wall time of fitting the decoder, the networks' answers to the calibration samples included.
        decoder_passes: Forward-equivalents spent on it: every expert and coded model on every sample that is read.
        memory_mib: What must be stored beyond the experts' own servers, in MiB: networks as they are stored, and heads
            or regressions for every erasure of the code; NaN for the oracle (as the next three).
        resident_mib: The weights that processes hold which answer with it, in MiB, heads or regressions included. A
            whole network takes what it takes stored; one in few bits runs packed, and its largest matrix is made beside
            it; a delta from a base is a whole network once loaded. Of copies all are held as stored, and one whole.
        forwards: Networks run for one lost answer, the survivors that are asked among them.
        losses: The most experts that may be lost at once.
        chance: The accuracy of guessing, 1 / the task's number of classes.
    """

    experiment: str
    seed: int
    method: str
    batchnorm: str
    decoder: str
    code_row: str
    erased: str
    task: str
    samples_per_task: int
    expert_accuracy: float
    decoded_accuracy: float
    nda: float
    agreement: float
    residual: float
    merge_seconds: float
    merge_passes: float
    decoder_seconds: float
    decoder_passes: float
    memory_mib: float = math.nan
    resident_mib: float = math.nan
    forwards: float = math.nan
    losses: float = math.nan
    chance: float = math.nan


COLUMNS: tuple[str, ...] = tuple(field.name for field in fields(Row))
KEYS: tuple[str, ...] = COLUMNS[: COLUMNS.index("expert_accuracy")]
NUMBERS: tuple[str, ...] = COLUMNS[len(KEYS) :]
TYPES = {
    **dict.fromkeys(KEYS, "str"),
    **dict.fromkeys(NUMBERS, "float64"),
    "seed": "int64",
    "samples_per_task": "int64",
}
"""The type of every column."""

PROMISE_COLUMNS = (
    *KEYS,
    "alpha",
    "confidence",
    "samples",
    "needed",
    "threshold",
    "promised",
    "coverage",
    "found",
)


def requested_policy(batchnorm: str) -> str:
    """Return the requested BatchNorm policy, ``auto`` for ``auto:recalibrate``."""
    return batchnorm.partition(":")[0]


def write_results(
    folder: Path,
    rows: Sequence[Row],
    configuration: Mapping[str, Any],
    confusions: Mapping[str, Counts] | None = None,
    methods: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write ``results.csv``, ``results.json`` (with versions, date and machine) and, of confusions, ``confusion.npz``.

    Args:
        folder: The seed's folder, made where it is missing.
        rows: The measurements, in the order in which tables and figures show the methods.
        configuration: The resolved configuration; what JSON does not know (paths, enums) is written as text.
        confusions: `confusion_key` → counts ``[C, C]``, the expert's answer × the decoded answer.
        methods: The metadata of every coded model: its label, its BatchNorm policy, and the choices made.
    """
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    document = {
        "rows": frame,
        "methods": list(methods),
        "configuration": dict(configuration),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    text = as_json(document)
    if confusions is not None:
        arrays: dict[str, Any] = dict(confusions)
        with atomic_path(folder / CONFUSION_NPZ) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    write_text(folder / RESULTS_JSON, text + "\n")
    write_frame(folder / RESULTS_CSV, frame)


def read_results(folder: Path) -> pd.DataFrame:
    """Return the rows of ``results.csv`` with `COLUMNS` in order, text as it stands, an empty number as NaN.

    Raises FileError where the file is missing or damaged, or lacks a column.
    """
    path = folder / RESULTS_CSV
    try:
        frame = pd.read_csv(
            path,
            usecols=list(COLUMNS),
            dtype=TYPES,
            keep_default_na=False,  # a task may be called "NA"
            na_values=dict.fromkeys(NUMBERS, ""),
        )
    except (OSError, ValueError) as error:
        raise FileError(
            f"'{path}' cannot be read as CSV ({first_line(error)}); make it with `coin run`"
        ) from error
    return frame[list(COLUMNS)]


def read_document(folder: Path) -> dict[str, Any]:
    """Return ``results.json``: configuration, methods, versions …; FileError where it is missing or damaged."""
    path = folder / RESULTS_JSON
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(
            f"'{path}' cannot be read as JSON ({first_line(error)}); {how_to_redo(path)}"
        ) from error
    return document


def confusion_key(row: Row) -> str:
    """Return a row's name in ``confusion.npz``: ``method|decoder|erased|task``."""
    return "|".join([row.method, row.decoder, row.erased, row.task])


def write_promises(folder: Path, promises: pd.DataFrame) -> None:
    """Write ``promise.csv``, a row per lost expert and decoder; remove an earlier one where nothing is promised.

    `threshold` is the largest score of an accepted answer, NaN where nothing is promised. `promised` is the share of
    the `samples` that are accepted, `coverage` that of the test samples, `found` the share of these that differ.
    """
    path = folder / PROMISE_CSV
    if promises.empty:
        path.unlink(missing_ok=True)
    else:
        write_frame(path, promises[list(PROMISE_COLUMNS)])


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a frame as CSV, without its index; NaN becomes an empty field and floats keep every digit."""
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False)


def as_json(document: Any) -> str:
    """Return a value as strict JSON text: a number that is not finite is ``null``, a data frame a list of its rows."""

    def plain(value: Any) -> Any:
        if isinstance(value, pd.DataFrame):
            return value.to_dict("records")
        if isinstance(value, np.ndarray | np.generic):
            return value.tolist()
        return str(value)

    text = json.dumps(document, default=plain)
    finite = json.loads(text, parse_constant=lambda name: None)
    return json.dumps(finite, indent=1, allow_nan=False, ensure_ascii=False)
