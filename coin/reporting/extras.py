"""Two optional files beside the results: a merge layer by layer, and example images."""

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from coin.errors import ConfigurationError, FileError
from coin.reporting.frames import one_line, read_frame, write_frame
from coin.state import atomic_path

LAYERS_CSV = "layers.csv"
EXAMPLES_NPZ = "examples.npz"
LAYER_COLUMNS = ("method", "layer", "fisher_share", "distance")


@dataclass(frozen=True)
class Examples:
    """Test images with what was answered for them.

    Args:
        images: ``[n, H, W, 3]``, uint8.
        expert: The expert's answers ``[n]``.
        decoded: The decoded answers ``[n]``.
        label: The labels ``[n]``.
        names: The classes' names ``[C]``; may be empty.

    Raises:
        ConfigurationError: The shapes or types do not fit together.
    """

    images: npt.NDArray[np.uint8]
    expert: npt.NDArray[np.int64]
    decoded: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.images)
        if self.images.ndim != 4 or self.images.shape[3] != 3 or self.images.dtype != np.uint8:
            raise ConfigurationError(
                f"found example images {list(self.images.shape)} of {self.images.dtype}, expected [n, H, W, 3] of uint8"
            )
        for name in ("expert", "decoded", "label"):
            if getattr(self, name).shape != (count,):
                raise ConfigurationError(
                    f"found {name} {list(getattr(self, name).shape)} for {count} example images, expected [{count}]"
                )

    def name_of(self, index: int) -> str:
        """Return a class's name, its index where it has none."""
        return self.names[index] if 0 <= index < len(self.names) else str(index)


def write_examples(folder: Path, examples: Examples) -> None:
    """Write ``examples.npz``.

    Raises:
        FileError: The file cannot be written.
    """
    arrays: dict[str, Any] = {**vars(examples), "names": np.asarray(examples.names, dtype=str)}
    with atomic_path(folder / EXAMPLES_NPZ) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_examples(folder: Path) -> Examples | None:
    """Return the examples, None where there is no such file.

    Raises:
        FileError: The file is damaged.
    """
    path = folder / EXAMPLES_NPZ
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            names = tuple(str(name) for name in file["names"])
            return Examples(file["images"], file["expert"], file["decoded"], file["label"], names)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FileError(f"'{path}' holds no example images ({one_line(error)}); make it again") from error


def write_layers(folder: Path, layers: pd.DataFrame) -> None:
    """Write ``layers.csv``: a merge layer by layer.

    Args:
        folder: The seed's folder.
        layers: Columns ``method``, ``layer`` (in the network's order), ``fisher_share`` (share of the Fisher's mass in
            this layer; NaN for methods without one) and ``distance`` (to the experts, relative).

    Raises:
        ConfigurationError: A column is missing.
        FileError: The file cannot be written.
    """
    if missing := [name for name in LAYER_COLUMNS if name not in layers.columns]:
        raise ConfigurationError(f"found no column '{missing[0]}' among the layers', expected {list(LAYER_COLUMNS)}")
    write_frame(folder / LAYERS_CSV, layers[list(LAYER_COLUMNS)])


def read_layers(folder: Path) -> pd.DataFrame | None:
    """Return the layers, None where there is no such file.

    Raises:
        FileError: The file is damaged, or a number is infinite.
    """
    path = folder / LAYERS_CSV
    if not path.exists():
        return None
    layers = read_frame(path, LAYER_COLUMNS, (), ("fisher_share", "distance"))
    if any(math.isinf(value) for name in ("fisher_share", "distance") for value in layers[name]):
        raise FileError(f"'{path}' holds an infinite number, expected finite ones; make it again")
    return layers
