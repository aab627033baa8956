"""Optional files beside the results: layers of a merge, example images, risks of decoded answers and promises.

Readers return None where there is no such file. They raise a FileError where it is damaged, and writers where it cannot
be written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from coin.errors import ConfigurationError, FileError, first_line
from coin.reporting.results import INTEGERS, KEYS, read_archive, read_frame, write_archive, write_frame

LAYERS_CSV = "layers.csv"
EXAMPLES_NPZ = "examples.npz"
RISK_CSV = "risk.csv"
RISK_NPZ = "risk.npz"
PROMISE_CSV = "promise.csv"
PROMISE_COLUMNS = (*KEYS, "alpha", "confidence", "samples", "needed", "threshold", "promised", "coverage", "found")
RISK_COLUMNS = (*KEYS, "curve", "at", "samples", "risk", "agreement", "decoded_accuracy", "expert_accuracy")
LAYER_COLUMNS = ("method", "batchnorm", "code_row", "layer", "fisher_share", "distance")

Answers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Test images ``[n, H, W, 3]``, uint8, with what was answered for them when their tasks' experts were lost alone.

    The `expert`'s answers, the `label` and what was `decoded`, by ``method|batchnorm|decoder``, are places ``[n]`` in
    `names`, the classes of all tasks one after the other (may be empty). `task` is that of each image, empty where it
    is not known. Raises ConfigurationError where shapes or types do not fit together.
    """

    images: npt.NDArray[np.uint8]
    expert: Answers
    label: Answers
    decoded: Mapping[str, Answers] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    task: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count, answers = len(self.images), [self.expert, self.label, *self.decoded.values()]
        if (
            self.images.ndim != 4
            or self.images.shape[3] != 3
            or self.images.dtype != np.uint8
            or any(own.shape != (count,) or own.dtype.kind not in "iu" for own in answers)
            or len(self.task) not in (0, count)
        ):
            raise ConfigurationError(
                f"found example images {list(self.images.shape)} of {self.images.dtype}, expected [n, H, W, 3] of "
                "uint8, and n whole numbers for the expert's answers, the labels and what was decoded"
            )

    def by_task(self) -> dict[str, list[int]]:
        """Return the indices of each task's images, in order of appearance; all under ``""`` where it is not known."""
        tasks = self.task or ("",) * len(self.images)
        return {task: [i for i, own in enumerate(tasks) if own == task] for task in dict.fromkeys(tasks)}

    def name_of(self, index: int) -> str:
        """Return a class's name, its index where it has none."""
        return self.names[index] if 0 <= index < len(self.names) else str(index)


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


def write_layers(folder: Path, layers: pd.DataFrame) -> None:
    """Write ``layers.csv``, a row per coded model and layer, layers in the network's order.

    ``code_row`` is which row of the code, ``fisher_share`` its share of the Fisher's mass (NaN for methods
    without one), ``distance`` that to the experts' β-average, relative to how far they are from it themselves: 0 for
    plain averaging, NaN where they agree.
    """
    write_frame(folder / LAYERS_CSV, layers[list(LAYER_COLUMNS)])


def read_layers(folder: Path) -> pd.DataFrame | None:
    """Return the rows of ``layers.csv``, if there is one."""
    return _read_optional(folder / LAYERS_CSV, LAYER_COLUMNS, (), ("fisher_share", "distance"))


def write_risk(folder: Path, risk: pd.DataFrame) -> None:
    """Write ``risk.csv``: how the risk of decoded answers turned out, two curves for every row of the results.

    On ``coverage`` are the share `at` of the test samples with the least risk, on ``calibration`` those whose risk is
    within 0.05 above `at`. Of these `samples`, `risk` is the mean, and the rest is as in ``results.csv``.
    """
    write_frame(folder / RISK_CSV, risk)


def read_risk(folder: Path) -> pd.DataFrame | None:
    """Return the rows of ``risk.csv``, if there is one."""
    return _read_optional(folder / RISK_CSV, RISK_COLUMNS, (*INTEGERS, "samples"), ("at", *RISK_COLUMNS[-4:]))


def write_promises(folder: Path, promises: pd.DataFrame) -> None:
    """Write ``promise.csv``, a row per lost expert and decoder; or take an earlier one away where nothing is promised.

    `threshold` is the largest risk of an accepted answer, NaN where no promise could be given from so many `samples`
    (`coin.promised_risk`). `promised` is the share of these that are accepted, `coverage` that of the test samples, and
    `found` how many of the latter differ from the expert's, as a share: `alpha` at most, with `confidence`.
    """
    if promises.empty:
        (folder / PROMISE_CSV).unlink(missing_ok=True)
    else:
        write_frame(folder / PROMISE_CSV, promises[list(PROMISE_COLUMNS)])


def read_promises(folder: Path) -> pd.DataFrame | None:
    """Return the rows of ``promise.csv``, if there is one."""
    integers = ("samples", "needed")
    numbers = [name for name in PROMISE_COLUMNS[len(KEYS) :] if name not in integers]
    return _read_optional(folder / PROMISE_CSV, PROMISE_COLUMNS, (*INTEGERS, *integers), numbers)


def _read_optional(path: Path, *columns: Sequence[str]) -> pd.DataFrame | None:
    return read_frame(path, *columns) if path.exists() else None
