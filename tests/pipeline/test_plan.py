"""The plan of an experiment: which option is in which step's key, and where a person sees what steps make."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from coin.commands.run import read_experiment
from coin.data import TaskData
from coin.errors import FileError
from coin.files.downloads import folder_contents
from coin.pipeline.plan import plan, publish
from coin.pipeline.pool import Launch
from coin.pipeline.run import run_experiment
from coin.pipeline.step import Step
from coin.pipeline.steps.imported import place_config

EXPERTS = {"expert-digits", "expert-letters"}
FISHERS = {"fisher-digits", "fisher-letters"}
MERGES = {"coded-average", "coded-coin", "coded-coin-recalibrate", "coded-coin-keep", "coded-distillation"}
RESULTS = {"evaluate", "report"}
AFTER_EXPERTS = FISHERS | MERGES | RESULTS | {"replicas-3bit-delta"}
BASE = {"base", "initial-10", "initial-6"}


@pytest.fixture
def planned(config: Path, tmp_path: Path) -> Callable[..., list[Step]]:
    """Return a function that plans the small experiment with options."""

    def make(*options: str) -> list[Step]:
        arguments = ["-c", str(config), f"--output={tmp_path}", "--replicas=[{bits: 3}]", *options]
        return plan(read_experiment(arguments)[0])

    return make


def keys(steps: list[Step]) -> dict[str, str]:
    return {step.name: step.key for step in steps}


def test_a_plan_has_every_step_after_what_it_needs(planned: Callable[..., list[Step]], tmp_path: Path) -> None:
    steps = planned()
    assert set(keys(steps)) == BASE | EXPERTS | AFTER_EXPERTS
    done: set[str] = set()
    for step in steps:
        assert {need.key for need in step.needs} <= done
        done.add(step.key)
    assert {step.name for step in steps[-1].closure.values()} == BASE | EXPERTS | AFTER_EXPERTS
    assert not list(tmp_path.iterdir())  # nothing is written


@pytest.mark.parametrize(
    ("option", "changed"),
    [
        ("--trainer={enable_progress_bar: false, log_every_n_steps: 1}", set()),
        ("--wandb.tags=[mine]", set()),
        ("--calibration.memory_mib=99", set()),
        ("--trainer={precision: 32, devices: auto, accelerator: cpu}", set()),
        ("--trainer={plugins: [{class_path: a.B}]}", BASE | EXPERTS | AFTER_EXPERTS),
        ("--tasks.letters.init_args.batch_size=16", set()),
        ("--tasks.letters.init_args.eval_batch_size=16", RESULTS),
        ("--tasks.letters.init_args.test_per_class=5", RESULTS),
        ("--tasks.digits.init_args.max_test=50", RESULTS),
        ("--base.lr=0.3", BASE | EXPERTS | AFTER_EXPERTS),
        ("--expert.lr=0.3", EXPERTS | AFTER_EXPERTS),
        (
            "--expert.overrides={digits: {lr: 0.3}}",
            {"expert-digits", "fisher-digits", "replicas-3bit-delta"} | MERGES | RESULTS,
        ),
        ("--trainer={precision: bf16-mixed}", BASE | EXPERTS | AFTER_EXPERTS),
        ("--calibration.samples_per_task=9", FISHERS | MERGES | RESULTS),
        (
            "--calibration.fisher_kind=categorical",
            FISHERS | RESULTS | {"coded-coin", "coded-coin-recalibrate", "coded-coin-keep"},
        ),
        ("--calibration.promise_samples=60", RESULTS),
        ("--code=[[0.5,0.5]]", MERGES | RESULTS),
        ("--decoders=[linear]", RESULTS),
        ("--name=other", RESULTS),
        ("--replicas=[{bits: 2}]", {"replicas-2bit-delta", *RESULTS}),
    ],
)
def test_an_option_changes_the_keys_of_what_it_changes(
    option: str, changed: set[str], planned: Callable[..., list[Step]]
) -> None:
    before, after = keys(planned()), keys(planned(option))
    assert {name for name, key in after.items() if before.get(name) != key} == changed


def test_an_edited_folder_of_hugging_face_s_changes_its_key(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"id2label": {"0": "a", "1": "b"}}')
    (tmp_path / "model.safetensors").write_text("weights")
    before, weighed = place_config(f"hf/{tmp_path}"), folder_contents(str(tmp_path), weights=True)
    (tmp_path / "config.json").write_text('{"id2label": {"0": "b", "1": "a"}}')
    assert place_config(f"hf/{tmp_path}") != before
    assert folder_contents(str(tmp_path), weights=True).keys() == {"config.json", "model.safetensors"}
    assert folder_contents(str(tmp_path), weights=True) != weighed
    assert place_config("hf/some/id") == {"place": "hf/some/id", "contents": {}, "files": []}
    assert place_config("weights.pth") == {"files": [Path("weights.pth")]}


def test_seeds_and_experiments_share_what_has_one_key(planned: Callable[..., list[Step]]) -> None:
    both = planned("--seeds=[0,1]")
    assert len(both) == len(BASE) + 2 * len(EXPERTS | AFTER_EXPERTS) + 1  # and the report of both
    first, other = (keys(planned(*options)) for options in (["--name=p1"], ["--name=p2", "--seeds=[1]"]))
    assert {name for name in first if first[name] == other[name]} == BASE
    other = keys(planned("--name=p2", "--calibration.promise_samples=60"))
    assert {name for name in first if first[name] != other[name]} == RESULTS


OWN = """
from torch import nn
from parts.sizes import WIDTH
import coin
class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, WIDTH, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, num_classes))
class Shapes(coin.data.Digits):
    pass
class Middle(coin.Average):
    pass
"""


def test_an_edited_class_of_the_user_s_changes_the_keys_of_what_it_makes(
    planned: Callable[..., list[Step]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "code"
    (folder / "parts").mkdir(parents=True)
    files = {"own_classes.py": OWN, "parts/sizes.py": "WIDTH = 4", "parts/__init__.py": "", "aside.py": ""}
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(folder)
    network = "--network={name: own_classes.Net, image_size: 16}"
    task = "--tasks.digits={class_path: own_classes.Shapes}"
    method = "--methods=[{class_path: own_classes.Middle}, {class_path: Coin}]"

    def changed_by(option: str, file: str, edit: str = "EDITED = 1") -> set[str]:
        before = keys(planned(option))
        (folder / file).write_text(f"{files[file]}\n{edit}\n")
        after = keys(planned(option))
        (folder / file).write_text(files[file])
        return {name for name, key in after.items() if before[name] != key}

    for file in ("own_classes.py", "parts/sizes.py", "parts/__init__.py"):
        assert changed_by(network, file) == BASE | EXPERTS | AFTER_EXPERTS
        assert {"expert-digits", "evaluate"} < changed_by(task, file) < EXPERTS | AFTER_EXPERTS
        assert changed_by(method, file) == {"coded-average", *RESULTS}
    for option in (network, task, method):
        assert changed_by(option, "aside.py") == set()
        assert changed_by(option, "own_classes.py", "# a comment") == set()


def test_imported_experts_are_known_by_their_contents(planned: Callable[..., list[Step]], tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        path.write_bytes(b"weights")
    found = [keys(planned(f"--expert.checkpoints={json.dumps({'digits': str(path)})}")) for path in paths]
    assert found[0] == found[1]
    paths[1].write_bytes(b"others")
    third = keys(planned(f"--expert.checkpoints={json.dumps({'digits': str(paths[1])})}"))
    assert {name for name, key in third.items() if found[0][name] != key} == {
        "expert-digits", "fisher-digits", "replicas-3bit-delta", *MERGES, *RESULTS
    }  # fmt: skip


def test_links_lead_to_the_latest_and_leave_what_was_made_before(
    planned: Callable[..., list[Step]], tmp_path: Path
) -> None:
    def made(steps: list[Step]) -> Step:
        step = next(step for step in steps if step.name == "expert-digits")
        step.folder.mkdir(parents=True)
        (step.folder / "expert.safetensors").write_text(step.key)
        step.publish()
        return step

    place = tmp_path / "tiny/seed-0/experts/digits/expert.safetensors"
    first = made(planned())
    assert place.read_text() == first.key
    second = made(planned("--expert.lr=0.3"))
    assert place.read_text() == second.key
    assert (first.folder / "expert.safetensors").read_text() == first.key
    assert not Path(place.parent.readlink()).is_absolute()


def test_a_folder_of_somebody_elses_is_not_replaced(planned: Callable[..., list[Step]], tmp_path: Path) -> None:
    (tmp_path / "tiny/seed-0/experts/digits").mkdir(parents=True)
    expert = next(step for step in planned() if step.name == "expert-digits")
    expert.folder.mkdir(parents=True)
    with pytest.raises(FileError, match=r"found the folder .*digits', expected coin's own link or nothing"):
        expert.publish()


def test_a_seed_s_folder_shows_the_latest_evaluation_beside_what_somebody_wrote(config: Path, tmp_path: Path) -> None:
    def show(option: str, **files: str) -> None:
        experiment = read_experiment(["-c", str(config), f"--output={tmp_path}", option])[0]
        steps = plan(experiment)
        (evaluation,) = (step for step in steps if step.name == "evaluate")
        for name, text in files.items():
            path = evaluation.folder / f"{name}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        publish(experiment, [evaluation], steps)

    seed = tmp_path / "tiny/seed-0"
    show("--decoders=[linear]", results="1", promise="2")
    assert (seed / "promise.csv").read_text() == "2"
    (seed / "mine.csv").write_text("mine")
    show("--decoders=[ridge]", results="3")
    assert {path.name: path.read_text() for path in seed.iterdir()} == {"results.csv": "3", "mine.csv": "mine"}


def test_a_part_of_an_experiment_reads_the_data_of_its_tasks_alone(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = read_experiment(["-c", str(config), f"--output={tmp_path}"])[0]
    read: list[str] = []
    run: list[str] = []
    monkeypatch.setattr(TaskData, "prepare_data", lambda task: read.append(type(task).__name__))
    monkeypatch.setattr(TaskData, "calibration", lambda task, *_, **__: read.append(type(task).__name__))
    monkeypatch.setattr("coin.pipeline.run.execute", lambda step, _: run.append(step.name))
    monkeypatch.setattr("coin.pipeline.run.publish", lambda *_: None)
    run_experiment(experiment, Launch(), lambda *_: None, only="digits")
    assert run == ["base", "initial-10", "expert-digits"]
    assert read == ["Digits", "Digits"]
    run_experiment(experiment, Launch(), lambda *_: None, only="coded-average")
    assert set(read) == {"Digits", "Glyphs"}
