"""Every option of an experiment, each changed alone: what decides results is in a key, all else is not."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from coin.commands.run import read_experiment
from coin.pipeline.plan import plan

VALUES: dict[str, Any] = {
    "name": "small_vit",
    "augmentation": "crop",
    "weights": "best",
    "lr_scheduler": "torch.optim.lr_scheduler.LinearLR",
    "classes": "A-E",
    "fisher_data": "pooled",
    "fisher_kind": None,
    "checkpoints": None,
    "batchnorm": "recalibrate",
    "class_path": None,
    "start": "average",
    "label": None,
    "bits": 4,
    "base_bits": 8,
    "code": [[0.3, 0.7]],
    "seeds": [1],
    "decoders": ["ridge"],
    "overrides": {"digits": {"lr": 0.5}},
    "options": {"width": 8},
    "damping": 0.5,
}
"""Other values, by an option's name, where one more or the opposite is none; None leaves it as it is."""

WITHOUT_EFFECT = {
    "output",
    "wandb.tags",
    "calibration.memory_mib",
    *(f"base.task.init_args.{name}" for name in ("eval_batch_size", "test_per_class")),
    *(
        f"{task}.init_args.{name}"
        for task in ("base.task", "tasks.digits", "tasks.letters")
        for name in ("augmentation", "batch_size")
    ),
    *(f"tasks.{task}.init_args.image_size" for task in ("digits", "letters")),
}
"""What changes no result; the size of images is the network's."""


def other(name: str, value: Any) -> Any:
    """Return another value of an option, or None for one that is left alone."""
    if name in VALUES:
        return VALUES[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2
    return f"{value}-other" if isinstance(value, str) else ["other"]


def leaves(config: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every option."""
    if isinstance(config, dict) and config and path[-1:] != ("options",):
        for name, value in config.items():
            yield from leaves(value, *path, name)
    elif isinstance(config, list) and config and isinstance(config[0], dict):
        for place, value in enumerate(config):
            yield from leaves(value, *path, place)
    else:
        yield path


@pytest.fixture(scope="module")
def resolved(config: Path) -> dict[str, Any]:
    """The small experiment with promises and copies, all its options written out."""
    options = ["--replicas=[{bits: 3}]", "--calibration.promise_samples=8", "--calibration.fisher_mc_samples=2"]
    options += ["--calibration.fisher_kind=monte_carlo", "--trainer={precision: bf16-mixed}"]
    options += ["--methods=[{class_path: Average}, {class_path: Coin}, {class_path: Distillation}]"]
    experiment, _ = read_experiment(["-c", str(config), *options])
    return experiment.of_seeds(experiment.seeds)


def keys(config: dict[str, Any], file: Path) -> list[str]:
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return [step.key for step in plan(read_experiment(["-c", str(file)])[0])]


def test_every_option_changes_a_key_or_is_known_to_change_nothing(resolved: dict[str, Any], tmp_path: Path) -> None:
    before = keys(resolved, tmp_path / "x.yaml")
    same = set()
    changed = set()
    for path in leaves(resolved):
        config = deepcopy(resolved)
        section = config
        for part in path[:-1]:
            section = section[part]
        value = other(str(path[-1]), section[path[-1]])
        if value is None:
            continue
        section[path[-1]] = value
        after = keys(config, tmp_path / "x.yaml")
        (same if after == before else changed).add(".".join(map(str, path)))
    assert same == WITHOUT_EFFECT
    assert len(changed) > 40


def test_the_order_of_tasks_is_in_the_keys_of_what_depends_on_it(resolved: dict[str, Any], tmp_path: Path) -> None:
    def by_name(config: dict[str, Any]) -> dict[str, str]:
        keys(config, tmp_path / "x.yaml")
        steps = plan(read_experiment(["-c", str(tmp_path / "x.yaml")])[0])
        return {step.name: step.key for step in steps}

    before = by_name(resolved)
    after = by_name({**resolved, "tasks": dict(reversed(resolved["tasks"].items()))})
    kept = {name for name, key in before.items() if after[name] == key}
    own = {f"{kind}-{task}" for kind in ("expert", "fisher") for task in ("digits", "letters")}
    assert kept == {"base", "initial-10", "initial-6"} | own
