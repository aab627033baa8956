"""Every option of every step, each changed alone: what decides a step's results is in its key, all else is not."""

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from coin.coding import Code
from coin.commands.run import read_experiment
from coin.data import TaskData
from coin.merging import Method
from coin.pipeline.options import _option_names
from coin.pipeline.plan import plan
from coin.pipeline.step import Step
from coin.tracking.runs import RunLog

OF_ALL = {"store", "doing", "log"}
OF_TASKS = {"augmentation", "batch_size", "num_workers"}
OF_TESTS = {"eval_batch_size", "max_test", "test_per_class"}
OF_PROMISES = {"promise_samples", "promise_alpha", "promise_confidence"}
OF_FISHERS = {"fisher_data", "fisher_kind", "fisher_mc_samples", "memory_mib"}  # the statistics' own fields have them


def below(field: str, *parts: str) -> set[str]:
    return {f"{field}.{part}" for part in parts}


UNKEYED = {
    "WriteInitial": set(),
    "TrainNetwork": below("task", *OF_TASKS, *OF_TESTS)
    | below("config", "task", "checkpoint", "seed", "overrides", "checkpoints"),
    "ImportExpert": {"task", "place"},  # of a file, which is known by its contents
    "EstimateStatistic": {"trainer", "fisher.memory_mib"}
    | below("tasks", *OF_TASKS, *OF_TESTS)
    | below("calibration", *OF_FISHERS, *OF_PROMISES),
    "Merge": {"hardware"} | below("tasks", *OF_TASKS, *OF_TESTS) | below("calibration", *OF_FISHERS, *OF_PROMISES),
    "CompressExperts": {"experts order"},
    "Report": set(),
    "Evaluate": {"configuration", "yaml"} | below("tasks", *OF_TASKS) | below("calibration", *OF_FISHERS),
}
"""What changes no result of a step, by its class: fields, and parts of fields."""

VALID: dict[str, Any] = {"name": "resnet18", "classes": tuple("XYZ"), "trainer": {"precision": "16-true"}}
"""Values of what takes no others."""

ATTRIBUTES = {"classes": "names"}
"""Where an option is kept that is read by a property."""


def variants(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is changed in a value of this name, and the value with that change."""
    if isinstance(value, Step):
        yield name, replace(value, name=f"another {value.name}")
    elif isinstance(value, Code):
        yield name, Code([[0.5, 0.5]])
    elif isinstance(value, Mapping) and name in ("experts", "tasks"):
        yield f"{name} order", dict(reversed(value.items()))
        yield f"{name} names", {f"{key}-2": entry for key, entry in value.items()}
        for key, entry in value.items():
            for what, other in variants(name, entry):
                yield what, {**value, key: other}
    elif isinstance(value, RunLog):
        yield name, None
    elif parts := parts_of(value):
        for part in parts:
            attribute = ATTRIBUTES.get(part) or (part if hasattr(value, part) else f"_{part}")
            changed = copy(value)
            for _, other in variants(part, getattr(value, attribute)):
                object.__setattr__(changed, attribute, other)
                break
            yield f"{name}.{part}", changed
    else:
        yield name, VALID.get(name, simple(value))


def parts_of(value: Any) -> list[str]:
    if isinstance(value, TaskData | Method):
        return _option_names(type(value))
    return [field.name for field in fields(value)] if is_dataclass(value) else []


def simple(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, Enum):
        return next(member for member in type(value) if member is not value)
    if isinstance(value, Path):
        return Path(__file__)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, Mapping):
        return {**value, "another": 1}
    return "another" if isinstance(value, str | None) else [*value, "another"]


@pytest.fixture(scope="module")
def steps(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """One or more steps of every class, with every option."""
    imported = tmp_path_factory.mktemp("imported") / "weights.safetensors"
    imported.write_bytes(b"weights")
    options = ["--replicas=[{bits: 3}]", "--calibration.promise_samples=60", "--calibration.fisher_data=pooled"]
    arguments = ["-c", str(config), *options]
    found = [planned.step for planned in plan(read_experiment(arguments)[0])]
    imports = read_experiment([*arguments, f"--expert.checkpoints={{digits: {imported}}}"])[0]
    return found + [planned.step for planned in plan(imports) if type(planned.step).__name__ == "ImportExpert"]


def test_every_option_changes_its_step_s_key_or_is_known_to_change_nothing(steps: list[Step]) -> None:
    changing: dict[str, set[str]] = {name: set() for name in UNKEYED}
    not_changing: dict[str, set[str]] = {name: set() for name in UNKEYED}
    for step in steps:
        kind = type(step).__name__
        for field in fields(step):
            for what, other in variants(field.name, getattr(step, field.name)):
                name = field.name if field.name in UNKEYED[kind] else what
                is_same = replace(step, **{field.name: other}).key == step.key
                (not_changing if is_same else changing)[kind].add(name)
    for kind, unkeyed in UNKEYED.items():
        assert not_changing[kind] - OF_ALL == unkeyed, kind
        assert not changing[kind] & (OF_ALL | unkeyed), kind
        assert len(changing[kind]) > 1, kind
