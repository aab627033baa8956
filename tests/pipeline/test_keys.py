"""Every option of an experiment, each changed alone: what decides results is in a key, all else is not."""

from copy import deepcopy
from functools import reduce
from operator import getitem

import pytest
import yaml

from coin.commands.run import read_experiment
from coin.pipeline.plan import plan

VALUES = {
    "name": "small_vit",
    "augmentation": "crop",
    "weights": "best",
    "lr_scheduler": "torch.optim.lr_scheduler.LinearLR",
    "classes": "A-E",
    "fisher_data": "pooled",
    "batchnorm": "recalibrate",
    "start": "average",
    "bits": 4,
    "base_bits": 8,
    "code": [[0.3, 0.7]],
    "seeds": [1],
    "decoders": ["ridge"],
    "overrides": {"digits": {"lr": 0.5}},
    "options": {"width": 8},
    "damping": 0.5,
}
"""Other values, by an option's name, where one more or the opposite is none."""
LEFT_ALONE = {"fisher_kind", "checkpoints", "class_path", "label"}

WITHOUT_EFFECT = {"output", "wandb.tags", "calibration.memory_mib"}
"""What changes no result; the size of images is the network's."""
for task in ("base.task", "tasks.digits", "tasks.letters"):
    WITHOUT_EFFECT |= {f"{task}.init_args.augmentation", f"{task}.init_args.batch_size"}
WITHOUT_EFFECT |= {f"tasks.{task}.init_args.image_size" for task in ("digits", "letters")}
WITHOUT_EFFECT |= {f"base.task.init_args.{name}" for name in ("eval_batch_size", "test_per_class")}


def other(name, value):
    """Return another value of an option."""
    if name in VALUES:
        return VALUES[name]
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2
        case str():
            return f"{value}-other"
    return ["other"]


def leaves(config, *path):
    """Yield the path of every option."""
    places = []
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


SECTIONS = ["tasks", "base", "expert", "methods", "calibration", "name", "network", "code"]
SECTIONS += ["decoders", "replicas", "seeds", "output", "trainer", "wandb"]


@pytest.fixture(scope="module")
def resolved(config):
    """The small experiment with promises and copies, all its options written out."""
    experiment, _ = read_experiment(["-c", str(config), *OPTIONS])
    found = experiment.of_seeds(experiment.seeds)
    assert found.keys() == {*SECTIONS}
    return found


@pytest.fixture
def keys(tmp_path):
    """Return a function that returns the keys of an experiment's steps."""
    file = tmp_path / "x.yaml"

    def planned(config):
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        experiment, _ = read_experiment(["-c", str(file)])
        return {step.name: step.key for step in plan(experiment)}

    return planned


@pytest.mark.parametrize("section", SECTIONS)
def test_every_option_changes_a_key_or_is_known_to_change_nothing(section, resolved, keys):
    before = keys(resolved)
    for path in leaves(resolved[section], section):
        *places, name = path
        if name in LEFT_ALONE:
            continue
        config = deepcopy(resolved)
        options = reduce(getitem, places, config)
        options[name] = other(str(name), options[name])
        called = ".".join(map(str, path))
        assert (keys(config) == before) == (called in WITHOUT_EFFECT), called


def test_the_order_of_tasks_is_in_the_keys_of_what_depends_on_it(resolved, keys):
    before = keys(resolved)
    after = keys({**resolved, "tasks": dict(reversed(resolved["tasks"].items()))})
    kept = {name for name, key in before.items() if after[name] == key}
    own = {f"{kind}-{task}" for kind in ("expert", "fisher") for task in ("digits", "letters")}
    assert kept == {"base", "initial-10", "initial-6"} | own
