"""Optional files beside the results: example images and promises; readers return None where there is none."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from coin.errors import FileError, first_line
from coin.reporting.results import INTEGERS, KEYS, read_archive, read_frame, write_archive, write_frame

EXAMPLES_NPZ = "examples.npz"
PROMISE_CSV = "promise.csv"
PROMISE_COLUMNS = (*KEYS, "alpha", "confidence", "samples", "needed", "threshold", "promised", "coverage", "found")

Answers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Test images ``[n, H, W, 3]``, uint8, with what was answered for them when their tasks' experts were lost alone.

    The `expert`'s answers, the `label` and what was `decoded`, by ``method|batchnorm|decoder``, are places ``[n]`` in
    `names`, the classes of all tasks one after the other; `task` is that of each image.
    """

    images: npt.NDArray[np.uint8]
    expert: Answers
    label: Answers
    decoded: Mapping[str, Answers]
    names: tuple[str, ...]
    task: tuple[str, ...]

    def by_task(self) -> dict[str, list[int]]:
        """Return the indices of each task's images, in order of appearance."""
        return {task: [i for i, own in enumerate(self.task) if own == task] for task in dict.fromkeys(self.task)}


def write_examples(folder: Path, examples: Examples | None) -> None:
    """Write ``examples.npz``, or take an earlier one away where there are no examples."""
    if examples is None:
        (folder / EXAMPLES_NPZ).unlink(missing_ok=True)
        return
    decoded = np.array(list(examples.decoded.values()), np.int64).reshape(-1, len(examples.images))
    text = {name: np.asarray(getattr(examples, name), dtype=str) for name in ("names", "task")}
    by = np.asarray(list(examples.decoded), dtype=str)
    write_archive(folder / EXAMPLES_NPZ, {**vars(examples), **text, "decoded": decoded, "decoded_by": by})


def read_examples(folder: Path) -> Examples | None:
    """Return the examples of ``examples.npz``, if there is one."""
    path = folder / EXAMPLES_NPZ
    if not path.exists():
        return None
    found = read_archive(path)
    try:
        names, tasks, by = (tuple(map(str, found[key])) for key in ("names", "task", "decoded_by"))
        decoded = dict(zip(by, found["decoded"], strict=True))
        return Examples(found["images"], found["expert"], found["label"], decoded, names, tasks)
    except (KeyError, ValueError, TypeError) as error:
        raise FileError(f"'{path}' holds no example images ({first_line(error)}); make it again") from error


def write_promises(folder: Path, promises: pd.DataFrame) -> None:
    """Write ``promise.csv``, a row per lost expert and decoder; take an earlier one away where nothing is promised.

    `threshold` is the largest score of an accepted answer, NaN where nothing is promised. `promised` is the share of
    the `samples` that are accepted, `coverage` that of the test samples, `found` the share of these that differ.
    """
    if promises.empty:
        (folder / PROMISE_CSV).unlink(missing_ok=True)
    else:
        write_frame(folder / PROMISE_CSV, promises[list(PROMISE_COLUMNS)])


def read_promises(folder: Path) -> pd.DataFrame | None:
    """Return the rows of ``promise.csv``, if there is one."""
    integers = ("samples", "needed")
    numbers = [name for name in PROMISE_COLUMNS[len(KEYS) :] if name not in integers]
    path = folder / PROMISE_CSV
    return read_frame(path, PROMISE_COLUMNS, (*INTEGERS, *integers), numbers) if path.exists() else None
