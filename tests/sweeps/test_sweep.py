"""``coin sweep``: its points, what they share, its table, and what happens when it is killed or a point fails."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pandas as pd
import pytest
import yaml

from coin.cli import main
from coin.data import Digits, Glyphs
from coin.errors import ConfigurationError
from coin.experiment import CalibrationConfig, Experiment, ExpertConfig
from coin.experiment.locks import alone_in, is_held
from coin.merging import Average, Coin
from coin.networks import NetworkConfig
from coin.reporting import COLUMNS, read_results
from coin.sweeps import point_run
from coin.sweeps.point_run import PointRun
from coin.sweeps.points import SweepPoint, read_sweep, sweep_points
from coin.sweeps.sharing import SharedStep, Shelf, shared_steps
from coin.sweeps.table import sweep_frame, sweep_table

SHIPPED = sorted((Path(__file__).parents[2] / "configs/sweep").glob("*.yaml"))
SWEEP: dict[str, Any] = {
    "name": "grid",
    "program": "coin",
    "command": ["coin", "run", "-c", "CONFIG", "--methods=[{class_path: Average}]", "${args}", "--decoders=[linear]"],
    "method": "grid",
    "metric": {"name": "nda_mean_best", "goal": "maximize"},
    "parameters": {
        "calibration.samples_per_task": {"values": [12, 24]},
        "calibration.batch_size": {"value": 12},
        "seeds": {"values": [[0], [1]]},
    },
}
NAMES = [
    "grid-000-samples_per_task-12-seeds-0",
    "grid-001-samples_per_task-12-seeds-1",
    "grid-002-samples_per_task-24-seeds-0",
    "grid-003-samples_per_task-24-seeds-1",
]


def write_sweep(path: Path, config: Path | str = "e.yaml", **changes: Any) -> Path:
    document = copy.deepcopy(SWEEP) | changes
    if isinstance(document["command"], list):
        document["command"] = [str(config) if part == "CONFIG" else part for part in document["command"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def points_of(tmp_path: Path, count: int | None = None, seed: int = 0, **changes: Any) -> list[SweepPoint]:
    return sweep_points(read_sweep(write_sweep(tmp_path / "s.yaml", **changes)), tmp_path / "grid", count, seed)


@pytest.fixture(scope="module")
def swept(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep of two sample sizes by two seeds, two points at a time."""
    folder = tmp_path_factory.mktemp("sweep")
    file = write_sweep(folder / "grid.yaml", config)
    assert main(["sweep", str(file), f"--output={folder}", "--jobs=2"]) == 0
    return folder / "grid"


def test_grid_is_the_product_in_the_files_order(tmp_path: Path) -> None:
    points = points_of(tmp_path)
    assert [point.name for point in points] == NAMES
    pairs = [tuple(point.values.values()) for point in points]
    assert pairs == [(12, [0]), (12, [1]), (24, [0]), (24, [1])]
    assert list(points[0].values) == ["calibration.samples_per_task", "seeds"]  # constants are not swept
    assert points[2].arguments == (
        "-c",
        "e.yaml",
        "--methods=[{class_path: Average}]",
        "--calibration.samples_per_task=24",
        "--calibration.batch_size=12",
        "--seeds=[0]",
        f"--name={NAMES[2]}",
        f"--output={tmp_path / 'grid'}",
        "--decoders=[linear]",
    )
    assert points_of(tmp_path, count=3) == points[:3]


def test_lists_and_sections_are_swept_as_they_stand(tmp_path: Path) -> None:
    methods = [[{"class_path": "Average"}], [{"class_path": "Coin", "init_args": {"damping": 0.1}}]]
    parameters = {"methods": {"values": methods}, "base": {"values": [None]}, "expert.weights": {"values": ["best"]}}
    points = points_of(tmp_path, parameters=parameters)
    assert [point.name for point in points] == [f"grid-00{i}-methods-{i}-base-null-weights-best" for i in (0, 1)]
    arguments = dict(argument.removeprefix("--").split("=", 1) for argument in points[1].arguments[3:6])
    assert yaml.safe_load(arguments["methods"]) == methods[1]
    assert yaml.safe_load(arguments["base"]) is None
    assert arguments["expert.weights"] == "best"


def test_random_draws_are_seeded_and_grow_with_the_count(tmp_path: Path) -> None:
    parameters = {
        "expert.lr": {"min": 1e-4, "max": 1.0, "distribution": "log_uniform_values"},
        "expert.momentum": {"min": 0.5, "max": 0.9},
        "calibration.samples_per_task": {"min": 5, "max": 9},
        "code": {"values": [[[0.5, 0.5]], [[0.4, 0.6]]], "probabilities": [0.0, 1.0]},
        "seeds": {"value": [3]},
    }
    changes: dict[str, Any] = {"method": "random", "parameters": parameters}
    points = points_of(tmp_path, count=200, **changes)
    assert points_of(tmp_path, count=7, **changes) == points[:7]
    assert points_of(tmp_path, count=7, seed=1, **changes) != points[:7]
    rates = [point.values["expert.lr"] for point in points]
    assert all(1e-4 <= rate <= 1 for rate in rates)
    below = sum(rate < 1e-2 for rate in rates)  # half of the range's logarithm
    assert abs(below - 100) < 4 * math.sqrt(200 / 4)
    assert all(0.5 <= point.values["expert.momentum"] <= 0.9 for point in points)
    assert {point.values["calibration.samples_per_task"] for point in points} == {5, 6, 7, 8, 9}
    assert all(point.values["code"] == [[0.4, 0.6]] for point in points)
    assert all("--seeds=[3]" in point.arguments for point in points)


def test_random_draws_no_point_twice(tmp_path: Path) -> None:
    parameters = {"seeds": {"values": [[0], [1], [2]]}}
    points = points_of(tmp_path, count=10, method="random", parameters=parameters)
    assert sorted(point.values["seeds"] for point in points) == [[0], [1], [2]]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"paramters": {}}, "paramters"),
    "method": ({"method": "bayes"}, "bayes"),
    "no parameters": ({"parameters": {}}, "parameters"),
    "name": ({"name": "a/b"}, "a/b"),
    "no command": ({"command": None}, "command"),
    "another program": ({"command": ["python", "train.py", "${args}"]}, "coin run"),
    "no args": ({"command": ["coin", "run", "-c", "e.yaml"]}, "${args}"),
    "the name is swept": ({"parameters": {"name": {"values": ["a"]}}}, "'name'"),
    "nested": ({"parameters": {"expert": {"parameters": {"lr": {"values": [1]}}}}}, "dotted"),
    "no list": ({"parameters": {"seeds": {"values": 3}}}, "seeds"),
    "a range in a grid": ({"parameters": {"expert.lr": {"min": 0.1, "max": 0.2}}}, "grid"),
    "a range of text": ({"method": "random", "parameters": {"expert.lr": {"min": "1e-3", "max": 1}}}, "1.0e-3"),
    "shares": (
        {"method": "random", "parameters": {"seeds": {"values": [[0], [1]], "probabilities": [0.5, 0.1]}}},
        "probabilities",
    ),
    "a distribution": (
        {"method": "random", "parameters": {"expert.lr": {"min": 0, "max": 1, "distribution": "normal"}}},
        "normal",
    ),
    "no count": ({"method": "random"}, "--count"),
    "an option of no experiment": ({"parameters": {"expert.speed": {"values": [1]}}}, "speed"),
    "sections that do not fit": ({"parameters": {"base": {"values": [{"checkpoint": "b.ckpt"}]}}}, "both or neither"),
    "a value that no experiment takes": ({"parameters": {"calibration.samples_per_task": {"values": [9, 0]}}}, "0"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line_before_anything_is_run(
    case: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, wanted = MISTAKES[case]
    file = write_sweep(tmp_path / "s.yaml", config, **changes)
    assert main(["sweep", str(file), f"--output={tmp_path / 'runs'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("coin: error: ")
    assert len(error.splitlines()) == 1
    assert wanted in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["a: [", "", "- 1", None])
def test_file_that_is_no_sweep_is_one_line(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.yaml"
    if text is not None:
        file.write_text(text)
    assert main(["sweep", str(file)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("coin: error: ")
    assert len(error.splitlines()) == 1
    assert str(file) in error


def wandb_violations(document: Any) -> list[str]:
    schema = json.loads((Path(__file__).parent / "wandb_sweep_schema.json").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(document)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid_for_wandb(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    assert wandb_violations(document) == []
    document["parameters"]["seeds"] = {"valuess": [[0]]}
    assert wandb_violations(document)  # the schema does look at the parameters


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_command_of_a_wandb_agent_is_one_of_ours(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    document = yaml.safe_load(path.read_text())
    parameters = document["parameters"].items()
    chosen = {key: {"value": p["values"][-1] if "values" in p else p["value"]} for key, p in parameters}
    arguments = create_sweep_command_args({"args": chosen})["args"]
    command = create_sweep_command(document["command"])
    monkeypatch.chdir(SHIPPED[0].parents[2])
    place = command.index("${args}")
    with pytest.raises(SystemExit) as stop:
        main([*command[1:place], *arguments, *command[place + 1 :], "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["seeds"] == chosen["seeds"]["value"]
    assert len(printed["methods"]) == len(document["parameters"]["methods"]["value"])


def tiny_experiment(**changes: Any) -> Experiment:
    options: dict[str, Any] = {
        "name": "tiny",
        "tasks": {"digits": Digits(), "letters": Glyphs(classes="A-F")},
        "methods": [Average()],
        "network": NetworkConfig("small_resnet", 16, None, {"width": 4}),
        "seeds": [0, 1],
    }
    return Experiment(**(options | changes))


def shared(first: Experiment, second: Experiment) -> set[str]:
    keys = {step.key for step in shared_steps(second)}
    return {step.name for step in shared_steps(first) if step.key in keys}


def test_points_are_tagged_with_their_sweep_for_w_and_b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    popen = SimpleNamespace(Popen=lambda *_, **options: started.append(options["env"]), DEVNULL=None, STDOUT=None)
    monkeypatch.setattr(point_run, "subprocess", popen)
    monkeypatch.setenv("WANDB_TAGS", "mine")
    PointRun(SweepPoint("grid-000", {}, ()), tmp_path / "grid/grid-000", tiny_experiment()).start(1)
    assert [environment["WANDB_TAGS"] for environment in started] == ["mine,sweep-grid"]


def test_points_share_the_steps_that_are_alike() -> None:
    plain = tiny_experiment()
    initial = {"base/initial-6.json", "base/initial-10.json"}
    experts = {f"seed-{seed}/expert-{task}.json" for seed in (0, 1) for task in ("digits", "letters")}
    statistics = {f"seed-{seed}/*.{kind}*.json" for seed in (0, 1) for kind in ("fisher", "gram")}
    assert shared(plain, plain) == initial | experts | statistics
    assert shared(plain, tiny_experiment(methods=[Coin()], code=[[0.3, 0.7]])) == initial | experts | statistics
    assert shared(plain, tiny_experiment(calibration=CalibrationConfig(samples_per_task=9))) == initial | experts
    assert shared(plain, tiny_experiment(expert=ExpertConfig(lr=0.5))) == initial
    assert shared(plain, tiny_experiment(network=NetworkConfig("small_resnet", 16, None, {"width": 8}))) == set()
    assert shared(plain, tiny_experiment(trainer={"precision": "bf16-mixed"})) == set()
    one = {name for name in experts | statistics if name.startswith("seed-1")}
    assert shared(plain, tiny_experiment(seeds=[1, 2])) == initial | one
    # Another task's own options leave an expert alone.
    own = tiny_experiment(expert=ExpertConfig(overrides={"letters": {"lr": 0.5}}))
    assert shared(plain, own) == initial | {name for name in experts if "digits" in name}


def finish_step(folder: Path, content: str) -> None:
    (folder / "seed-0/.steps").mkdir(parents=True, exist_ok=True)
    (folder / "seed-0/experts").mkdir(exist_ok=True)
    (folder / "seed-0/experts/e.bin").write_text(content)
    (folder / "seed-0/.steps/expert-a.json").write_text(json.dumps({"key": "k", "outputs": {"experts/e.bin": "hash"}}))


def test_steps_are_taken_over_from_a_neighbour_with_the_same_key(tmp_path: Path) -> None:
    def shelf(name: str, key: str) -> Shelf:
        return Shelf(tmp_path / name, [SharedStep("seed-0", "expert-a.json", key)])

    first, second, other = shelf("first", "one"), shelf("second", "one"), shelf("other", "two")
    assert first.open() == []
    assert second.waits_for(first)
    assert not other.waits_for(first)
    finish_step(first.folder, "weights")
    assert not second.waits_for(first)
    assert other.open() == []
    assert second.open() == ["seed-0/expert-a taken over from first"]
    source, target = (tmp_path / name / "seed-0/experts/e.bin" for name in ("first", "second"))
    assert source.samefile(target)
    assert (tmp_path / "second/seed-0/.steps/expert-a.json").is_file()
    # The same folder after the sweep's file has changed: its record says nothing any more.
    changed = shelf("second", "three")
    assert changed.open() == []
    assert not (tmp_path / "second/seed-0/.steps/expert-a.json").exists()
    assert source.read_text() == "weights"


def test_damaged_neighbour_is_left_alone(tmp_path: Path) -> None:
    step = SharedStep("seed-0", "expert-a.json", "one")
    assert Shelf(tmp_path / "first", [step]).open() == []
    finish_step(tmp_path / "first", "weights")
    (tmp_path / "first/seed-0/experts/e.bin").unlink()
    assert Shelf(tmp_path / "second", [step]).open() == []
    assert not (tmp_path / "second/seed-0/.steps/expert-a.json").exists()


def test_table_holds_every_points_results(swept: Path) -> None:
    frame = pd.read_csv(swept / "sweep.csv", keep_default_na=False)
    assert list(frame.columns) == ["calibration.samples_per_task", "seeds", *COLUMNS]
    assert list(dict.fromkeys(frame.experiment)) == NAMES
    assert (frame["calibration.samples_per_task"] == frame.samples_per_task).all()
    assert (frame.seeds == "[" + frame.seed.astype(str) + "]").all()
    for name, rows in frame.groupby("experiment"):
        results = pd.read_csv(next((swept / str(name)).glob("seed-*/results.csv")), keep_default_na=False)
        pd.testing.assert_frame_equal(rows[list(COLUMNS)].reset_index(drop=True), results)
    assert set(frame.method) == {"average", "oracle"}


def test_report_shows_the_swept_samples(swept: Path) -> None:
    page = (swept / "report.html").read_text()
    assert "coin: sweep grid" in page
    assert f"coin sweep {swept.resolve()}/sweep.yaml" in page
    assert (swept / "plots/nda_against_samples.svg").is_file()
    assert "samples_per_task: 12, 24" in page
    assert "Task letters lost" in page  # of the points with the most samples
    again = read_sweep(swept / "sweep.yaml")
    assert (again.name, again.parameters) == ("grid", SWEEP["parameters"])


def test_base_and_experts_are_trained_once(swept: Path) -> None:
    files = {name: sorted((swept / name).rglob("*.safetensors")) for name in NAMES}
    assert len({path.stat().st_ino for name in NAMES for path in files[name] if path.name == "base.safetensors"}) == 1
    experts = [path for name in NAMES for path in files[name] if path.name == "expert.safetensors"]
    assert len(experts) == 8
    assert len({path.stat().st_ino for path in experts}) == 4  # two tasks by two seeds
    logs = [(swept / name / "sweep.log").read_text() for name in NAMES]
    assert sum(log.count("base: pretraining") for log in logs) == 1
    assert sum(log.count("fine-tuning") for log in logs) == 4
    assert sum(log.count(": up to date") for log in logs) == 4
    # Calibration samples differ, so coded models do not share their results.
    assert len({path.stat().st_ino for name in NAMES for path in files[name] if path.parent.name == "coded"}) == 4


def test_finished_sweep_starts_nothing(
    swept: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in swept.glob("*/sweep.log")}
    assert main(["sweep", str(swept.parent / "grid.yaml"), f"--output={swept.parent}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in swept.glob("*/sweep.log")} == before
    assert "4 finished already" in capsys.readouterr().err


def test_second_sweep_in_the_same_folder_is_refused(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone_in(swept):
        assert main(["sweep", str(swept.parent / "grid.yaml"), f"--output={swept.parent}"]) == 2
    assert "found another coin command at work in" in capsys.readouterr().err


def test_terminal_table_is_the_mean_over_tasks_and_seeds(swept: Path) -> None:
    keys = ["calibration.samples_per_task", "seeds"]
    frame = sweep_frame(
        [
            ({keys[0]: samples, keys[1]: [seed]}, [swept / NAMES[index] / f"seed-{seed}"])
            for index, (samples, seed) in enumerate([(12, 0), (12, 1), (24, 0), (24, 1)])
        ]
    )
    table = sweep_table(frame, keys, "a sweep")
    cells = {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
    assert list(cells) == ["samples_per_task", "method", "BatchNorm", "linear"]
    assert cells["samples_per_task"] == ["12", "24"]
    assert cells["method"] == ["average", "average"]
    for line, samples in enumerate((12, 24)):
        rows = frame[(frame.samples_per_task == samples) & (frame.method == "average")]
        first, second = (100 * rows.nda[rows.seed == seed].mean() for seed in (0, 1))
        spread = abs(first - second) / math.sqrt(2)
        assert cells["linear"][line] == f"{(first + second) / 2:.1f} ± {spread:.1f}"


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the sweep ended before it could be ended"
        assert time.monotonic() < deadline, "the sweep did not come so far"
        time.sleep(0.02)


def test_ended_sweep_goes_on_to_the_same_table(swept: Path, config: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path / "grid.yaml", config)
    folder = tmp_path / "grid"
    command = [sys.executable, "-m", "coin", "sweep", str(file), f"--output={tmp_path}", "--jobs=1", "--count=3"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # SIGTERM ends the point's process as well.
    process = subprocess.Popen(command, **quiet)
    wait_for((folder / NAMES[0] / "base/checkpoints/step-key").exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not is_held(folder / NAMES[0])
    # SIGKILL leaves it working, and the next sweep must not start a second process beside it.
    process = subprocess.Popen(command, **quiet)
    wait_for((folder / NAMES[1] / "seed-1/experts/digits/checkpoints/step-key").exists, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    assert is_held(folder / NAMES[1])
    assert set(pd.read_csv(folder / "sweep.csv").experiment) == {NAMES[0]}
    first = (folder / NAMES[0] / "seed-0/results.csv").stat().st_mtime_ns
    assert main(["sweep", str(file), f"--output={tmp_path}", "--jobs=2", "--count=3"]) == 0
    assert (folder / NAMES[0] / "seed-0/results.csv").stat().st_mtime_ns == first
    own, wanted = (
        pd.read_csv(path / "sweep.csv").drop(columns=["merge_seconds", "decoder_seconds"]) for path in (folder, swept)
    )  # fmt: skip
    pd.testing.assert_frame_equal(own, wanted[wanted.experiment != NAMES[3]])


def test_failing_point_leaves_the_others_alone(
    swept: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bases = [
        {"task": None, "checkpoint": str(folder / "base/base.safetensors")} for folder in (tmp_path, swept / NAMES[0])
    ]
    file = write_sweep(tmp_path / "grid.yaml", config, parameters={"base": {"values": bases}})
    assert main(["sweep", str(file), f"--output={tmp_path}", "--jobs=1"]) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    log = tmp_path / "grid/grid-000-base-0/sweep.log"
    assert line.startswith("coin: error: 1 of 2 points failed")
    assert str(log) in line
    assert str(tmp_path / "base/base.safetensors") in log.read_text().strip().splitlines()[-1]
    assert "average" in captured.out
    frame = pd.read_csv(tmp_path / "grid/sweep.csv")
    assert set(frame.experiment) == {"grid-001-base-1"}
    assert set(frame.base.map(json.loads).map(lambda base: base["checkpoint"])) == {bases[1]["checkpoint"]}
    assert len(frame) == len(read_results(tmp_path / "grid/grid-001-base-1/seed-0"))


def test_jobs_are_at_least_one(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(write_sweep(tmp_path / "s.yaml", config)), "--jobs=0"]) == 2
    assert "jobs 0" in capsys.readouterr().err


def test_count_is_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="count 0"):
        points_of(tmp_path, count=0)
