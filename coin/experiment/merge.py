"""The merge step: experts and statistics from files in, coded models as files out."""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from coin.coding import Code
from coin.data import Calibration
from coin.errors import ConfigurationError
from coin.experiment.codes import SeedCode
from coin.experiment.experts import ExpertFiles
from coin.experiment.store import described
from coin.files.atomic import sha256_of
from coin.files.tensors import State
from coin.merging import CodedModel, Method
from coin.merging.calibrated import CalibratedExperts
from coin.merging.experts import padded_statistic
from coin.networks import check_layout, open_network, save_network
from coin.processes import is_first
from coin.statistics import FisherKind
from coin.statistics.files import StatisticFile, open_statistic
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind

StatisticPaths = Mapping[Statistic, Mapping[str, Path]]
"""The files of every expert's statistics, by task."""


class StoredExperts(CalibratedExperts):
    """The experts of one merge in files, read as far as they are needed.

    Args:
        files: The experts.
        statistics: The files of their statistics.
        calibrations: Each task's calibration samples; for methods and policies that run networks.
        initial: The shared initialisation's file.
        train: What trains the coded model of a method that is trained.
    """

    def __init__(
        self,
        files: ExpertFiles,
        statistics: StatisticPaths | None = None,
        calibrations: Mapping[str, Calibration] | None = None,
        initial: Path | None = None,
        train: Callable[[Any, Any, Sequence[float]], CodedModel] | None = None,
    ) -> None:
        self.passes = self.seconds = 0.0
        self.train = train
        self.files = files
        self._paths = dict(statistics or {})
        self._calibration = None if not calibrations else list(calibrations.values())
        self._initial_path = initial
        self._computed, self._outputs = {}, {}

    @property
    def count(self) -> int:
        """N."""
        return len(self.files.paths)

    @property
    def parameters(self) -> Sequence[State]:
        """Every expert's parameters, its head padded with zeros; read when they are asked for."""
        return self.files.parameters

    @property
    def buffers(self) -> Sequence[State]:
        """Every expert's buffers, read when they are asked for."""
        return self.files.buffers

    @cached_property
    def networks(self) -> Sequence[nn.Module]:  # type: ignore[override]
        """All experts at once."""
        return self.files.networks

    @property
    def has_batchnorm(self) -> bool:
        """Whether the networks have BatchNorm layers with running statistics."""
        return self.files.layout.batchnorm

    def each_network(self) -> Iterator[nn.Module]:
        """Yield the experts, one at a time unless they are in memory already."""
        return self.files.each_network()

    def blank(self) -> nn.Module:
        """Return a new network of the experts' architecture, whose contents do not matter."""
        return self.files.blank()

    def initial(self) -> tuple[State, State]:
        """Return the shared initialisation's parameters and buffers, its head padded like the experts'.

        Raises:
            ConfigurationError: There is none.
            FileError: The file is missing or damaged.
            StateError: It is of another architecture, or not finite.
        """
        if self._initial_path is None:
            raise ConfigurationError("found no shared initialisation, which the method or 'keep' needs; name its file")
        file, layout = open_network(self._initial_path).state, self.files.layout
        shapes = {name: each.shape for name, each in self.files.padded(file).items()}
        check_layout(layout.shapes, shapes, str(self._initial_path))
        return self.files.padded(file.select(layout.parameters)), file.select(layout.buffers)

    def available(self, name: StatisticKind, data: DataChoice) -> list[DataChoice]:
        """Return on which data a statistic can be had, of what a method's option allows."""
        there = list(dict.fromkeys(which.data for which in self._paths if which.name is name))
        allowed = [each for each in there if data in (DataChoice.auto, each)]
        if not there:
            raise ConfigurationError(
                f"found no {name} of the experts, which the method needs; run coin fisher on each and name the files"
            )
        if not allowed:
            raise ConfigurationError(
                f"found {name} files of {', '.join(there)} data, the method is to take {data}; name such files, or "
                f"set {name}_data"
            )
        return allowed

    def statistic(self, which: Statistic) -> Sequence[State]:
        """Open one statistic of every expert, after checking that it is of that expert's weights.

        Raises:
            ConfigurationError: There is none for some expert.
            FileError: A file is damaged or of other weights.
        """
        if which not in self._computed:
            paths = self._paths.get(which, {})
            if missing := [task for task in self.files.paths if task not in paths]:
                raise ConfigurationError(
                    f"found no {which} of expert '{missing[0]}', which the method needs; run coin fisher on it and "
                    "name the file"
                )
            marks = self.files.marks
            found = [open_statistic(paths[task], statistic=which.name, weights=mark) for task, mark in marks.items()]
            self.seconds += sum(file.seconds for file in found)
            self.passes += sum(file.passes for file in found)
            head, width = self.files.head, self.files.width
            self._computed[which] = [padded_statistic(file.values, head, width, _kind_of(file)) for file in found]
        return self._computed[which]


def _kind_of(file: StatisticFile) -> FisherKind | None:
    return FisherKind(file.provenance["kind"]) if file.provenance["statistic"] == StatisticKind.fisher else None


def make_coded_models(
    method: Method, choice: SeedCode, experts: StoredExperts, folder: Path, samples_per_task: int | None
) -> list[Path]:
    """Make the coded models of one method, one a row of the code, and write them.

    Args:
        method: The method with its options.
        choice: The code, R×N, and what choosing it has cost, which is part of what the coded models cost.
        experts: The experts, their statistics and calibration data.
        folder: Where the files go: ``METHOD.safetensors``, or ``METHOD.row-r.safetensors`` for several rows.
        samples_per_task: P, for the record.

    Returns:
        The R files, in the order of the rows.

    Raises:
        ConfigurationError: Something the method needs is not there.
    """
    code = choice.code
    if code.num_experts != experts.count:
        raise ConfigurationError(f"found a code for {code.num_experts} experts, expected {experts.count}")
    paths = coded_paths(method, code, folder)
    shared = {"shared_seconds": choice.seconds, "shared_passes": choice.passes}
    for index, (path, row) in enumerate(zip(paths, code.matrix.tolist(), strict=True)):
        started, passes, elsewhere = time.perf_counter(), experts.passes, experts.seconds
        made = method.make(experts, row)
        seconds = time.perf_counter() - started + experts.seconds - elsewhere
        if is_first():
            provenance = _provenance(method, code, index, experts, method.samples_per_task or samples_per_task)
            provenance |= {"seconds": seconds, "passes": experts.passes - passes, "chosen": made.chosen, **shared}
            save_network(path, made.network, experts.files.config, experts.files.width, provenance)
    return paths


def coded_paths(method: Method, code: Code, folder: Path) -> list[Path]:
    """Return the files of a method's coded models: the label, and the policy where it is not the default one."""
    option = inspect.signature(type(method)).parameters.get("batchnorm")
    plain = option is None or method.batchnorm == option.default
    stem = method.label if plain else f"{method.label}-{method.batchnorm}"
    if code.num_coded == 1:
        return [folder / f"{stem}.safetensors"]
    return [folder / f"{stem}.row-{row}.safetensors" for row in range(code.num_coded)]


def _provenance(
    method: Method, code: Code, row: int, experts: StoredExperts, samples_per_task: int | None
) -> dict[str, Any]:
    """Return what a coded model's file says of itself, but for what it cost."""
    files = experts.files
    hashes = files.sha256 | {path: sha256_of(path) for paths in experts._paths.values() for path in paths.values()}
    return {
        "made_by": "coin merge",
        "label": method.label,
        "method": {"name": method.name, "options": described(method)},
        "batchnorm": str(method.batchnorm) if files.layout.batchnorm else "",
        "code": code.matrix.tolist(),
        "row": row,
        "tasks": list(files.paths),
        "class_counts": list(files.class_counts.values()),
        "experts": list(files.marks.values()),
        "samples_per_task": samples_per_task,
        "sha256": {str(path): found for path, found in hashes.items()},
    }
