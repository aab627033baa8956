"""The files of a measurement, written and read back exactly; tables, figures and the report need nothing else."""

import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from coin.core.versions import machine, versions
from coin.errors import ConfigurationError, FileError, first_line
from coin.files.atomic import atomic_path, how_to_redo, write_text

RESULTS_CSV = "results.csv"
RESULTS_JSON = "results.json"
CONFUSION_NPZ = "confusion.npz"
_DAMAGED = (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises on archives that are cut off, damaged, or something else altogether."""

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
        residual: ‖f_c − Σβ_i f_i‖ / ‖Σβ_i f_i‖; NaN where there is no coded model.
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


STAND_IN_COSTS = ("memory_mib", "forwards", "losses")
RESIDENT, CHANCE = "resident_mib", "chance"  # older files lack these columns
COLUMNS: tuple[str, ...] = tuple(field.name for field in fields(Row))
KEYS: tuple[str, ...] = COLUMNS[: COLUMNS.index("expert_accuracy")]
NUMBERS: tuple[str, ...] = COLUMNS[len(KEYS) :]
INTEGERS = ("seed", "samples_per_task")


def requested_policy(batchnorm: str) -> str:
    """Return the requested BatchNorm policy, ``auto`` for ``auto:recalibrate``."""
    return batchnorm.partition(":")[0]


def write_results(
    folder: Path,
    rows: Sequence[Row],
    configuration: Mapping[str, Any],
    confusions: Mapping[str, Counts] | None = None,
    methods: Sequence[Mapping[str, Any]] = (),
    classes: Mapping[str, Sequence[str]] | None = None,
    wandb_url: str | None = None,
) -> None:
    """Write ``results.csv``, ``results.json`` (with versions, date and machine) and, of confusions, ``confusion.npz``.

    Args:
        folder: The seed's folder, made where it is missing.
        rows: The measurements, in the order in which tables and figures shall show the methods.
        configuration: The resolved configuration; what JSON does not know (paths, enums) is written as text.
        confusions: `confusion_key` → counts ``[C, C]``, the expert's answer × the decoded answer.
        methods: The metadata of every coded model: its label, its BatchNorm policy, and the choices made.
        classes: The names of every task's classes.
        wandb_url: Where the evaluation's W&B run is to be seen; None where it is not online.

    Raises ConfigurationError where there are no rows, two rows measure the same thing, or a task has a reserved name.
    """
    if not rows:
        raise ConfigurationError("found no rows to write, expected at least one measurement")
    frame = pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS))
    if (frame["task"] == "mean").any():
        raise ConfigurationError("found a task called 'mean', the name of the mean over tasks; rename the task")
    if twice := _measured_twice(frame):
        raise ConfigurationError(f"found two results of {twice}, expected one; tell the two apart with 'label'")
    document = {"rows": frame, "methods": list(methods), "configuration": dict(configuration), "classes": classes or {}}
    made = {"versions": versions(), "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    text = as_json({**document, **made, "wandb": wandb_url})
    if confusions is not None:
        write_archive(folder / CONFUSION_NPZ, confusions)
    write_text(folder / RESULTS_JSON, text + "\n")
    write_frame(folder / RESULTS_CSV, frame)


def read_results(folder: Path) -> pd.DataFrame:
    """Return the rows of ``results.csv`` with `COLUMNS` in order; FileError where one is damaged or there twice."""
    path = folder / RESULTS_CSV
    frame = read_frame(path, COLUMNS, INTEGERS, NUMBERS)[list(COLUMNS)]
    if np.isinf(frame[[name for name in NUMBERS if name != "residual"]]).any(axis=None):
        raise FileError(f"'{path}' holds an infinite number, expected finite ones; make it again")
    if twice := _measured_twice(frame):
        raise FileError(f"'{path}' holds two rows of {twice}, expected one; make it again")
    return frame


def read_configuration(folder: Path) -> dict[str, Any]:
    """Return the object of ``results.json``: configuration, methods, versions …; FileError if missing or damaged."""
    document = _read_json(folder / RESULTS_JSON)
    if not isinstance(document.get("configuration"), dict):
        raise FileError(f"'{folder / RESULTS_JSON}' holds no 'configuration', expected a section; make it again")
    return document


def check_current(seed_folder: Path) -> None:
    """Raise FileError where a seed's results are of other experts than those that stand in its folder.

    ``experts`` in the configuration of ``results.json`` has the key of every task's expert, and so has
    ``experts/TASK/done.json``. Where one of them does not say it, nothing is checked.
    """
    recorded = read_configuration(seed_folder)["configuration"].get("experts")
    for task, key in recorded.items() if isinstance(recorded, dict) else ():
        path = seed_folder / "experts" / task / "done.json"
        if path.is_file() and _read_json(path).get("key") != key:
            told = f"the results in '{seed_folder}' are of another expert '{task}' than the one that stands there"
            raise FileError(f"{told}; run `coin run` again")


def confusion_key(row: Row) -> str:
    """Return a row's name in ``confusion.npz``: ``method|batchnorm|decoder|erased|task``, with the requested policy."""
    return "|".join((row.method, requested_policy(row.batchnorm), row.decoder, row.erased, row.task))


def read_confusions(folder: Path) -> dict[str, Counts]:
    """Return the counts ``[C, C]`` of ``confusion.npz`` by `confusion_key`, none without it; FileError if damaged."""
    path = folder / CONFUSION_NPZ
    if not path.exists():
        return {}
    found = read_archive(path)
    for key, counts in found.items():
        if counts.ndim != 2 or len({*counts.shape}) > 1 or counts.dtype.kind not in "iu":
            told = f"'{path}' holds {counts.dtype} {list(counts.shape)} under '{key:.60}'"
            raise FileError(f"{told}, expected whole numbers [C, C]")
    return found


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a frame as CSV, without its index; NaN becomes an empty field and floats keep every digit."""
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False)


def read_frame(path: Path, columns: Sequence[str], integers: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    """Return a CSV file that has these columns, beside others: text as it stands, an empty number as NaN.

    Only `RESIDENT` and `CHANCE` may be missing, with their mean and spread; they are NaN then.
    Raises FileError where the file is missing, damaged, or lacks a column or a row.
    """
    if not path.is_file():
        raise FileError(f"found no file '{path}', expected an evaluated run; make it with `coin run`")
    try:
        # As text first: pandas would read a task called "NA" as missing and the code row "0" as a number.
        frame = pd.read_csv(path, dtype="str", keep_default_na=False)
    except (OSError, ValueError) as error:
        raise FileError(f"'{path}' cannot be read as CSV ({first_line(error)}); make it again") from error
    may_be_missing = (name for name in columns if name.startswith((RESIDENT, CHANCE)))
    frame = frame.assign(**{name: "" for name in may_be_missing if name not in frame.columns})
    if missing := [name for name in columns if name not in frame.columns]:
        raise FileError(f"'{path}' has no column '{missing[0]}' ({len(missing)} missing); run the experiment again")
    if frame.empty:
        raise FileError(f"'{path}' holds no rows, expected at least one; make it again")
    try:
        numeric = frame[list(numbers)].replace("", "nan").astype("float64")
        return frame.assign(**numeric).astype(dict.fromkeys(integers, "int64"))
    except (ValueError, TypeError) as error:
        raise FileError(f"'{path}' has no number where one is expected ({first_line(error)}); make it again") from error


def read_archive(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an ``.npz`` file; FileError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _DAMAGED as error:
        raise FileError(f"'{path}' is not a whole .npz file ({first_line(error)}); make it again") from error


def write_archive(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as an ``.npz`` file."""
    named: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **named)


def as_json(document: Any) -> str:
    """Return a value as strict JSON text: a number that is not finite is ``null``, a data frame a list of its rows."""

    def plain(value: Any) -> Any:
        if isinstance(value, pd.DataFrame):
            return value.to_dict("records")
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

    finite = json.loads(json.dumps(document, default=plain), parse_constant=lambda name: None)
    return json.dumps(finite, indent=1, allow_nan=False, ensure_ascii=False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"found no file '{path}', expected an evaluated run; make it with `coin run`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"'{path}' cannot be read as JSON ({first_line(error)}); {how_to_redo(path)}") from error
    return document if isinstance(document, dict) else {}


def _measured_twice(frame: pd.DataFrame) -> str:
    """Say what has a second row, nothing where all rows measure something else."""
    again = frame.loc[frame.duplicated(list(KEYS)), ["method", "batchnorm", "decoder", "erased", "task"]]
    return ", ".join(f"{name} '{value}'" for name, value in again.iloc[0].items()) if len(again) else ""
