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

WITHOUT_EFFECT = {"output", "wandb.tags", "calibration.memory_mib"}
"""What changes no result; the size of images is the network's."""
for task in ("base.task", "tasks.digits", "tasks.letters"):
    WITHOUT_EFFECT |= {f"{task}.init_args.augmentation", f"{task}.init_args.batch_size"}
WITHOUT_EFFECT |= {f"tasks.{task}.init_args.image_size" for task in ("digits", "letters")}
WITHOUT_EFFECT |= {f"base.task.init_args.{name}" for name in ("eval_batch_size", "test_per_class")}


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
    places: Any = []
    if isinstance(config, dict) and path[-1:] != ("options",):
        places = config
    elif isinstance(config, list) and config and isinstance(config[0], dict):
        places = range(len(config))
    for place in places:
        yield from leaves(config[place], *path, place)
    if not places:
        yield path


OPTIONS = [
    "--replicas=[{bits: 3}]",
    "--calibration.promise_samples=8",
    "--calibration.fisher_mc_samples=2",
    "--calibration.fisher_kind=monte_carlo",
    "--trainer={precision: bf16-mixed}",
    "--methods=[{class_path: Average}, {class_path: Coin}, {class_path: Distillation}]",
]


@pytest.fixture(scope="module")
def resolved(config: Path) -> dict[str, Any]:
    """The small experiment with promises and copies, all its options written out."""
    experiment, _ = read_experiment(["-c", str(config), *OPTIONS])
    return experiment.of_seeds(experiment.seeds)


def keys(config: dict[str, Any], file: Path) -> dict[str, str]:
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    steps = plan(read_experiment(["-c", str(file)])[0])
    return {step.name: step.key for step in steps}


@pytest.mark.parametrize("part", ["tasks", "base", "expert", "methods", "calibration", "others"])
def test_every_option_changes_a_key_or_is_known_to_change_nothing(
    part: str, resolved: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "x.yaml"
    before = keys(resolved, file)
    tried = 0
    for path in leaves(resolved):
        is_part = path[0] == part or (part == "others" and path[0] in OTHERS)
        config = deepcopy(resolved)
        section = config
        for place in path[:-1]:
            section = section[place]
        value = other(str(path[-1]), section[path[-1]])
        if value is None or not is_part:
            continue
        section[path[-1]] = value
        name = ".".join(map(str, path))
        assert (keys(config, file) == before) == (name in WITHOUT_EFFECT), name
        tried += 1
    assert tried >= 3


OTHERS = ("name", "network", "code", "decoders", "replicas", "seeds", "output", "trainer", "wandb")


def test_every_section_is_tried(resolved: dict[str, Any]) -> None:
    assert resolved.keys() == {"tasks", "base", "expert", "methods", "calibration", *OTHERS}


def test_the_order_of_tasks_is_in_the_keys_of_what_depends_on_it(
    resolved: dict[str, Any], tmp_path: Path
) -> None:
    before = keys(resolved, tmp_path / "x.yaml")
    swapped = dict(reversed(resolved["tasks"].items()))
    after = keys({**resolved, "tasks": swapped}, tmp_path / "x.yaml")
    kept = {name for name, key in before.items() if after[name] == key}
    own = {f"{kind}-{task}" for kind in ("expert", "fisher") for task in ("digits", "letters")}
    assert kept == {"base", "initial-10", "initial-6"} | own
