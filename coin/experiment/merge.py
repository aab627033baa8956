"""The merge step: experts and statistics from files in, coded models as files out."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coin.coding import Code
from coin.data import Calibration, pooled
from coin.errors import ConfigurationError
from coin.experiment.steps import described
from coin.merging import MergeInputs, MergeMethod, Requirement
from coin.merging.networks import FITTED, expert_outputs, merge_row, parameters_of
from coin.networks import (
    BatchNormPolicy,
    NetworkFile,
    has_batchnorm,
    head_name,
    load_network,
    pad_head,
    save_network,
    widen_network,
)
from coin.state import fingerprint, sha256_of
from coin.statistics import OutputMap
from coin.statistics.files import StatisticFile, load_statistic


@dataclass
class Ingredients:
    """Everything a merge method may ask for, read or computed when it is first needed.

    Args:
        experts: The experts' files by task.
        statistics: By statistic (``fisher``, ``gram``), the files by task.
        calibrations: Each task's calibration samples; for methods and policies that run networks.
        initial: The shared initialisation's file.
    """

    experts: Mapping[str, Path]
    statistics: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    calibrations: Mapping[str, Calibration] | None = None
    initial: Path | None = None

    def __post_init__(self) -> None:
        self.files: dict[str, NetworkFile] = {task: load_network(path) for task, path in self.experts.items()}
        self.width = max(file.num_classes for file in self.files.values())
        self.networks: list[nn.Module] = [widen_network(file, self.width) for file in self.files.values()]
        self.head = head_name(self.networks[0])
        self.marks = {task: fingerprint(file.network.state_dict()) for task, file in self.files.items()}
        self.config = next(iter(self.files.values())).config
        for task, file in self.files.items():
            if file.config.name != self.config.name:
                raise ConfigurationError(
                    f"found expert '{task}' of architecture {file.config.name}, expected {self.config.name} as of the "
                    "first"
                )

    def read(self, statistic: str) -> list[StatisticFile]:
        """Return a statistic of every expert, after checking that it is of that expert's weights.

        Raises:
            ConfigurationError: There is none for some expert.
            FileError: A file is damaged or of other weights.
        """
        paths = self.statistics.get(statistic, {})
        if missing := [task for task in self.experts if task not in paths]:
            raise ConfigurationError(
                f"found no {statistic} of expert '{missing[0]}', which the method needs; run coin fisher "
                "on it and name the file"
            )
        return [load_statistic(paths[task], statistic=statistic, weights=self.marks[task]) for task in self.experts]

    def pooled(self) -> Calibration:
        """Return all tasks' calibration samples.

        Raises:
            ConfigurationError: There are none.
        """
        if not self.calibrations:
            raise ConfigurationError("found no calibration data, which the method needs; name the tasks")
        return pooled(list(self.calibrations.values()))

    def initial_state(self) -> dict[str, Tensor]:
        """Return the shared initialisation's tensors, its head padded like the experts'."""
        if self.initial is None:
            raise ConfigurationError("found no shared initialisation, which the method or 'keep' needs; name its file")
        return pad_head(load_network(self.initial).network.state_dict(), self.head, self.width)


def merge_experts(
    method: MergeMethod, code: Code, ingredients: Ingredients, folder: Path, samples_per_task: int | None
) -> list[Path]:
    """Merge the experts by one method into one coded model a row of the code, and write them.

    Args:
        method: The merge method with its options.
        code: The code, R×N.
        ingredients: Experts, statistics and calibration data.
        folder: Where the files go: ``METHOD.safetensors``, or ``METHOD.row-r.safetensors`` for several rows.
        samples_per_task: P, for the record.

    Returns:
        The R files, in the order of the rows.

    Raises:
        ConfigurationError: Something the method needs is not there.
        StateError: Experts do not fit together, or the result is not finite: nothing is written then.
    """
    if code.num_experts != len(ingredients.networks):
        raise ConfigurationError(f"found a code for {code.num_experts} experts, expected {len(ingredients.networks)}")
    inputs, seconds, passes = _inputs(method, ingredients)
    buffers = ingredients.initial_state() if ingredients.initial is not None else None
    networks, spent = [], []
    for row in code.matrix.tolist():
        started = time.perf_counter()
        network, row_passes = merge_row(
            method,
            ingredients.networks,
            row,
            inputs,
            initial_buffers=buffers,
            batches=ingredients.pooled() if ingredients.calibrations else None,
        )
        networks.append(network)
        spent.append((time.perf_counter() - started, row_passes))
    paths = coded_paths(method, code, folder)
    for index, (path, network, (row_seconds, row_passes)) in enumerate(zip(paths, networks, spent, strict=True)):
        provenance = coded_provenance(method, code, index, ingredients, samples_per_task)
        provenance |= {"seconds": row_seconds, "passes": row_passes, "shared_seconds": seconds, "shared_passes": passes}
        save_network(path, network, ingredients.config, ingredients.width, provenance)
    return paths


def coded_paths(method: Any, code: Code, folder: Path) -> list[Path]:
    """Return the files of a method's coded models: the label, and the policy where it is not the default one."""
    policy = BatchNormPolicy(method.batchnorm)
    default = type(method)().batchnorm
    stem = str(method.label) if policy == default else f"{method.label}-{policy}"
    if code.num_coded == 1:
        return [folder / f"{stem}.safetensors"]
    return [folder / f"{stem}.row-{row}.safetensors" for row in range(code.num_coded)]


def coded_provenance(
    method: Any, code: Code, row: int, ingredients: Ingredients, samples_per_task: int | None
) -> dict[str, Any]:
    """Return what a coded model's file says of itself, but for what it cost."""
    sources = [*ingredients.experts.values(), *(p for paths in ingredients.statistics.values() for p in paths.values())]
    return {
        "made_by": "coin merge",
        "label": method.label,
        "method": {"name": method.name, "options": described(method)},
        "batchnorm": str(method.batchnorm) if has_batchnorm(ingredients.networks[0]) else "",
        "code": code.matrix.tolist(),
        "row": row,
        "tasks": list(ingredients.experts),
        "class_counts": [file.num_classes for file in ingredients.files.values()],
        "experts": list(ingredients.marks.values()),
        "samples_per_task": samples_per_task,
        "sha256": {str(path): sha256_of(path) for path in sources},
    }


def _inputs(method: MergeMethod, ingredients: Ingredients) -> tuple[MergeInputs, float, float]:
    """Return what the method needs that is the same for all rows, with its cost in seconds and passes."""
    seconds = passes = 0.0
    states: dict[str, Any] = {"experts": [parameters_of(network) for network in ingredients.networks]}
    for requirement, statistic, key in ((Requirement.FISHER, "fisher", "fishers"), (Requirement.GRAM, "gram", "grams")):
        if requirement in method.requires:
            files = ingredients.read(statistic)
            states[key] = [_padded(file, ingredients, statistic) for file in files]
            seconds += sum(file.seconds for file in files)
            passes += sum(file.passes for file in files)
    if Requirement.INITIAL in method.requires:
        initial = ingredients.initial_state()
        states["initial"] = {name: initial[name] for name in states["experts"][0]}
    if method.requires & FITTED:
        started = time.perf_counter()
        states["expert_outputs"] = expert_outputs(ingredients.networks, ingredients.pooled())
        seconds += time.perf_counter() - started
        passes += float(states["expert_outputs"].shape[0] * states["expert_outputs"].shape[1])
    if Requirement.EXPERT_MAPS in method.requires:
        if not ingredients.calibrations:
            raise ConfigurationError(f"found no calibration data, which method '{method.label}' needs; name the tasks")
        states["expert_maps"] = [
            OutputMap(network, list(calibration))
            for network, calibration in zip(ingredients.networks, ingredients.calibrations.values(), strict=True)
        ]
    return MergeInputs(**states), seconds, passes


def _padded(file: StatisticFile, ingredients: Ingredients, statistic: str) -> dict[str, Tensor]:
    """Pad a Fisher's head like the expert's, whose added logits are zero.

    The exact Fisher of a linear head is the same for every output, since each logit is its own row times the features:
    the padded rows get it too. The other kinds weigh the outputs by probabilities, which an output that is no class of
    the task does not have: their padded rows are zero.
    """
    if statistic != "fisher":
        return file.values
    fill = None
    if file.provenance["kind"] in ("exact", "monte_carlo"):
        names = [name for name in (f"{ingredients.head}.weight", f"{ingredients.head}.bias") if name in file.values]
        fill = {name: file.values[name].mean(0) for name in names}
    return pad_head(file.values, ingredients.head, ingredients.width, fill=fill)
