"""The merge step: experts and statistics from files in, coded models as files out."""

import inspect
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coin.atomic import sha256_of
from coin.coding import Code
from coin.data import Calibration, pooled
from coin.errors import ConfigurationError
from coin.experiment.codes import SeedCode
from coin.experiment.experts import Experts
from coin.experiment.records import described
from coin.merging import MergeInputs, MergeMethod, Requirement
from coin.merging.networks import FITTED, expert_outputs, merge_states
from coin.networks import BatchNormPolicy, check_layout, open_network, save_network
from coin.state import State
from coin.statistics import OutputMap
from coin.statistics.files import StatisticFile, load_statistic


@dataclass
class Ingredients:
    """Everything a merge method may ask for, read or computed when it is first needed.

    Args:
        experts: The experts.
        statistics: By statistic (``fisher``, ``gram``), the files by task.
        calibrations: Each task's calibration samples; for methods and policies that run networks.
        initial: The shared initialisation's file.
    """

    experts: Experts
    statistics: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    calibrations: Mapping[str, Calibration] | None = None
    initial: Path | None = None

    def read(self, statistic: str) -> list[StatisticFile]:
        """Open a statistic of every expert, after checking that it is of that expert's weights.

        Raises:
            ConfigurationError: There is none for some expert.
            FileError: A file is damaged or of other weights.
        """
        paths = self.statistics.get(statistic, {})
        if missing := [task for task in self.experts.paths if task not in paths]:
            raise ConfigurationError(
                f"found no {statistic} of expert '{missing[0]}', which the method needs; run coin fisher "
                "on it and name the file"
            )
        marks = self.experts.marks
        return [load_statistic(paths[task], statistic=statistic, weights=mark) for task, mark in marks.items()]

    def pooled(self) -> Calibration:
        """Return all tasks' calibration samples.

        Raises:
            ConfigurationError: There are none.
        """
        if not self.calibrations:
            raise ConfigurationError("found no calibration data, which the method needs; name the tasks")
        return pooled(list(self.calibrations.values()))

    def initial_state(self, names: Iterable[str]) -> State:
        """Return these tensors of the shared initialisation, its head padded like the experts'; read when asked for.

        Raises:
            ConfigurationError: There is none.
            FileError: The file is missing or damaged.
            StateError: It is of another architecture, or not finite.
        """
        if self.initial is None:
            raise ConfigurationError("found no shared initialisation, which the method or 'keep' needs; name its file")
        file = open_network(self.initial).state
        whole = self.experts.padded(file)
        check_layout(self.experts.layout.shapes, {name: each.shape for name, each in whole.items()}, str(self.initial))
        return self.experts.padded(file.select(names))


def merge_experts(
    method: MergeMethod, choice: SeedCode, ingredients: Ingredients, folder: Path, samples_per_task: int | None
) -> list[Path]:
    """Merge the experts by one method into one coded model a row of the code, and write them.

    Args:
        method: The merge method with its options.
        choice: The code, R×N, and what choosing it has cost, which is part of what the coded models cost.
        ingredients: Experts, statistics and calibration data.
        folder: Where the files go: ``METHOD.safetensors``, or ``METHOD.row-r.safetensors`` for several rows.
        samples_per_task: P, for the record.

    Returns:
        The R files, in the order of the rows.

    Raises:
        ConfigurationError: Something the method needs is not there.
    """
    code, experts = choice.code, ingredients.experts
    if code.num_experts != len(experts.paths):
        raise ConfigurationError(f"found a code for {code.num_experts} experts, expected {len(experts.paths)}")
    inputs, seconds, passes = _inputs(method, ingredients)
    buffers = ingredients.initial_state(experts.layout.buffers) if ingredients.initial is not None else None
    paths = coded_paths(method, code, folder)
    shared = {"shared_seconds": seconds + choice.seconds, "shared_passes": passes + choice.passes}
    for index, (path, row) in enumerate(zip(paths, code.matrix.tolist(), strict=True)):
        started = time.perf_counter()
        network, row_passes = merge_states(
            method,
            experts.blank,
            experts.buffers,
            row,
            inputs,
            initial_buffers=buffers,
            batches=ingredients.pooled() if ingredients.calibrations else None,
        )
        row_seconds = time.perf_counter() - started
        provenance = coded_provenance(method, code, index, ingredients, samples_per_task)
        provenance |= {"seconds": row_seconds, "passes": row_passes, **shared}
        save_network(path, network, experts.config, experts.width, provenance)
    return paths


def coded_paths(method: Any, code: Code, folder: Path) -> list[Path]:
    """Return the files of a method's coded models: the label, and the policy where it is not the default one."""
    policy = BatchNormPolicy(method.batchnorm)
    option = inspect.signature(type(method)).parameters.get("batchnorm")
    plain = option is None or policy == option.default
    stem = str(method.label) if plain else f"{method.label}-{policy}"
    if code.num_coded == 1:
        return [folder / f"{stem}.safetensors"]
    return [folder / f"{stem}.row-{row}.safetensors" for row in range(code.num_coded)]


def coded_provenance(
    method: Any, code: Code, row: int, ingredients: Ingredients, samples_per_task: int | None
) -> dict[str, Any]:
    """Return what a coded model's file says of itself, but for what it cost."""
    experts = ingredients.experts
    statistics = [path for paths in ingredients.statistics.values() for path in paths.values()]
    hashes = experts.sha256 | {path: sha256_of(path) for path in statistics}
    return {
        "made_by": "coin merge",
        "label": method.label,
        "method": {"name": method.name, "options": described(method)},
        "batchnorm": str(method.batchnorm) if experts.layout.batchnorm else "",
        "code": code.matrix.tolist(),
        "row": row,
        "tasks": list(experts.paths),
        "class_counts": list(experts.class_counts.values()),
        "experts": list(experts.marks.values()),
        "samples_per_task": samples_per_task,
        "sha256": {str(path): found for path, found in hashes.items()},
    }


def _inputs(method: MergeMethod, ingredients: Ingredients) -> tuple[MergeInputs, float, float]:
    """Return what the method needs that is the same for all rows, with its cost in seconds and passes."""
    seconds = passes = 0.0
    experts = ingredients.experts
    states: dict[str, Any] = {"experts": experts.parameters}
    read: dict[Requirement, list[StatisticFile]] = {}
    for requirement, key in ((Requirement.FISHER, "fishers"), (Requirement.GRAM, "grams")):
        if requirement in method.requires:
            read[requirement] = files = ingredients.read(str(requirement))
            states[key] = [_padded(file, ingredients, requirement) for file in files]
            seconds += sum(file.seconds for file in files)
            passes += sum(file.passes for file in files)
    if Requirement.INITIAL in method.requires:
        states["initial"] = ingredients.initial_state(experts.layout.parameters)
    if method.requires & FITTED:
        started = time.perf_counter()
        states["expert_outputs"] = expert_outputs(experts.each_network(), ingredients.pooled())
        seconds += time.perf_counter() - started
        passes += float(states["expert_outputs"].shape[0] * states["expert_outputs"].shape[1])
    if Requirement.EXPERT_MAPS in method.requires:
        samples = _samples_of(read[Requirement.FISHER], method, ingredients)
        states["expert_maps"] = [
            OutputMap(network, each) for network, each in zip(experts.networks, samples, strict=True)
        ]
    return MergeInputs(**states), seconds, passes


def _samples_of(fishers: list[StatisticFile], method: MergeMethod, ingredients: Ingredients) -> list[Calibration]:
    """Return the calibration samples of each expert's Fisher: its own task's, or all tasks'."""
    if not ingredients.calibrations:
        raise ConfigurationError(f"found no calibration data, which method '{method.label}' needs; name the tasks")
    everything, own = ingredients.pooled(), ingredients.calibrations.values()
    pairs = zip(fishers, own, strict=True)
    return [everything if fisher.provenance.get("data") == "pooled" else samples for fisher, samples in pairs]


def _padded(file: StatisticFile, ingredients: Ingredients, statistic: Requirement) -> State:
    """Pad a Fisher's head like the expert's, whose added logits are zero.

    The exact Fisher of a linear head is the same for every output, since each logit is its own row times the features:
    the padded rows get it too. The other kinds weigh the outputs by probabilities, which an output that is no class of
    the task does not have: their padded rows are zero.
    """
    if statistic is not Requirement.FISHER:
        return file.values
    head = ingredients.experts.head
    fill = None
    if file.provenance["kind"] in ("exact", "monte_carlo"):
        names = [name for name in (f"{head}.weight", f"{head}.bias") if name in file.values]
        fill = {name: file.values[name].mean(0) for name in names}
    return ingredients.experts.padded(file.values, fill)
