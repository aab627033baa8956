"""Data frames as CSV files that read back exactly."""

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from coin.errors import FileError
from coin.files.atomic import atomic_path

DAMAGED_NPZ = (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises on archives that are cut off, damaged, or something else altogether."""


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a frame as CSV, without its index; NaN becomes an empty field and floats keep every digit.

    Raises:
        FileError: The file cannot be written.
    """
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False)


def read_frame(path: Path, columns: Sequence[str], integers: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    """Return the named columns of a CSV file: text as it stands, an empty number as NaN.

    Args:
        path: The file.
        columns: Names that must be there, in the order to return.
        integers: Those among them that hold integers.
        numbers: Those among them that hold floats.

    Raises:
        FileError: The file is missing, damaged, or lacks a column or a row.
    """
    if not path.is_file():
        raise FileError(f"found no file '{path}', expected an evaluated run; make it with `coin run`")
    try:
        # As text first: pandas would read a task called "NA" as missing and the code row "0" as a number.
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise FileError(f"'{path}' cannot be read as CSV ({one_line(error)}); make it again") from error
    if missing := [name for name in columns if name not in frame.columns]:
        raise FileError(
            f"'{path}' has no column '{missing[0]}' ({len(missing)} missing): it is damaged, or of another version of "
            "coin; run the experiment again"
        )
    if frame.empty:
        raise FileError(f"'{path}' holds no rows, expected at least one; make it again")
    frame = frame[list(columns)]
    try:
        for name in integers:
            frame[name] = [int(text) for text in frame[name]]
        for name in numbers:
            frame[name] = [float(text) if text else math.nan for text in frame[name]]
    except (TypeError, ValueError) as error:
        raise FileError(f"'{path}' is damaged in column '{name}' ({one_line(error)}); make it again") from error
    return frame


def one_line(error: Exception) -> str:
    """Return an exception's message on one line, its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
