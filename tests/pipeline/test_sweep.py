"""``coin sweep``: its points, what they share, its table, and what happens when it is killed or a point fails."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

import coin.commands.sweep
import coin.commands.sweep_run
from coin.cli import main
from coin.commands.sweep_run import PointRun
from coin.errors import CoinError, ConfigurationError
from coin.pipeline.command import Command
from coin.pipeline.executors import raise_for, run_commands
from coin.pipeline.launch import Executor, Launch
from coin.pipeline.locks import folder_lock
from coin.pipeline.sweep import SweepPoint, read_sweep, sweep_points
from coin.reporting import read_results
from coin.reporting.extras import RISK_COLUMNS
from coin.reporting.results import COLUMNS
from coin.reporting.sweeps import sweep_frame, sweep_table

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("elsewhere")]

SWEEP: dict[str, Any] = {
    "name": "grid",
    "experiment": ["CONFIG"],
    "grid": {"calibration.samples_per_task": [12, 24], "seeds": [[0], [1]]},
    "set": {"methods": [{"class_path": "Average"}], "decoders": ["linear"], "calibration.batch_size": 12},
}
NAMES = [
    "grid-000-samples_per_task-12-seeds-0",
    "grid-001-samples_per_task-12-seeds-1",
    "grid-002-samples_per_task-24-seeds-0",
    "grid-003-samples_per_task-24-seeds-1",
]


def write_sweep(path: Path, config: Path | str = "e.yaml", **changes: Any) -> Path:
    document = {name: part for name, part in (SWEEP | changes).items() if part is not None}
    if document.get("experiment") == ["CONFIG"]:
        document["experiment"] = [str(config)]
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def points_of(tmp_path: Path, **changes: Any) -> list[SweepPoint]:
    return sweep_points(read_sweep(write_sweep(tmp_path / "s.yaml", **changes)), tmp_path / "grid")


@pytest.fixture(scope="module")
def swept(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep of two sample sizes by two seeds, two points at a time."""
    folder = tmp_path_factory.mktemp("sweep")
    file = write_sweep(folder / "grid.yaml", config)
    assert main(["sweep", str(file), f"--output={folder}", "--jobs=2"]) == 0
    return folder / "grid"


def test_grid_is_the_product_in_the_files_order(tmp_path: Path) -> None:
    points = points_of(tmp_path, experiment=["e.yaml", "over.yaml"])
    assert [point.name for point in points] == NAMES
    pairs = [tuple(point.values.values()) for point in points]
    assert pairs == [(12, [0]), (12, [1]), (24, [0]), (24, [1])]
    assert list(points[0].values) == ["calibration.samples_per_task", "seeds"]  # what is set is not swept
    assert points[2].arguments == (
        *("-c", "e.yaml", "-c", "over.yaml"),
        '--methods=[{"class_path": "Average"}]',
        '--decoders=["linear"]',
        "--seeds=[0]",
        "--calibration.batch_size=12",
        "--calibration.samples_per_task=24",
        f"--name={NAMES[2]}",
        f"--output={tmp_path / 'grid'}",
    )


def test_lists_and_sections_are_swept_as_they_stand(tmp_path: Path) -> None:
    methods = [[{"class_path": "Average"}], [{"class_path": "Coin", "init_args": {"damping": 0.1}}]]
    grid = {"methods": methods, "base": [None], "expert.weights": ["best"], "expert": [{"epochs": 2}]}
    points = points_of(tmp_path, experiment="e.yaml", grid=grid, set=None)
    names = [f"grid-00{i}-methods-{i}-base-null-weights-best-expert-0" for i in (0, 1)]
    assert [point.name for point in points] == names
    arguments = dict(argument.removeprefix("--").split("=", 1) for argument in points[1].arguments[2:6])
    assert yaml.safe_load(arguments["methods"]) == methods[1]
    assert yaml.safe_load(arguments["base"]) is None
    # A section would replace what stands before it.
    assert list(arguments) == ["methods", "base", "expert", "expert.weights"]
    assert arguments["expert.weights"] == "best"


def test_a_list_of_grids_has_the_points_of_each(tmp_path: Path) -> None:
    grids = [{"seeds": [[0], [1]], "base.seed": [1]}, {"base.seed": [2], "seeds": [[2]]}]
    points = points_of(tmp_path, experiment="e.yaml", grid=grids, set=None)
    assert [(point.values["seeds"], point.values["base.seed"]) for point in points] == [([0], 1), ([1], 1), ([2], 2)]
    assert [point.name[:8] for point in points] == ["grid-000", "grid-001", "grid-002"]


MISTAKES: dict[str, tuple[dict[str, Any] | str, str]] = {
    "unknown key": ({"girt": {}}, "found key 'girt'"),
    "W&B's dialect": ({"experiment": None, "grid": None, "parameters": {}}, "started by `wandb sweep`"),
    "no grid": ({"grid": {}}, "found grid {}"),
    "a list of no grids": ({"grid": [1]}, "found grid [1]"),
    "grids of other keys": ({"grid": [{"seeds": [[0]]}, {"base.seed": [1]}]}, "with the same keys"),
    "a grid whose second has no list": ({"grid": [{"seeds": [[0]]}, {"seeds": 1}]}, "grid 'seeds' with 1"),
    "a list for set": ({"set": [1]}, "found set [1]"),
    "name": ({"name": "a/b"}, "a/b"),
    "a name that leads out": ({"name": ".."}, "'..'"),
    "no experiment": ({"experiment": None}, "experiment"),
    "an experiment written out": ({"experiment": {"name": "e"}}, "file"),
    "an experiment that is not there": ({"experiment": ["none.yaml"]}, "none.yaml"),
    "the name is swept": ({"grid": {"name": ["a"]}}, "'name'"),
    "the output is set": ({"set": {"output": "a"}}, "'output'"),
    "one expert alone": ({"set": {"only": "digits"}}, "'only'"),
    "set and swept": ({"set": {"seeds": [0]}}, "'seeds' in grid and in set"),
    "a point twice": ({"grid": [{"seeds": [[0]]}, {"seeds": [[1], [0]]}]}, 'found the point {"seeds": [0]} twice'),
    "nested": ({"grid": {"expert": {"lr": [1]}}}, "dotted"),
    "no list": ({"grid": {"seeds": 3}}, "seeds"),
    "no value": ({"grid": {"seeds": []}}, "seeds"),
    "a number as a key": ({"grid": {7: [1]}}, "key 7"),
    "an option of no experiment": ({"grid": {"expert.speed": [1]}}, "speed"),
    "sections that do not fit": ({"grid": {"base": [{"checkpoint": __file__}]}}, "both or neither"),
    "a value that no experiment takes": ({"grid": {"calibration.samples_per_task": [9, 0]}}, "0"),
    "cut off": ("a: [", "cannot use 's.yaml' as YAML"),
    "empty": ("", "found no keys in 's.yaml'"),
    "a list": ("- 1", "found no keys in 's.yaml'"),
    "a date": ("experiment: e.yaml\ngrid: {seeds: [2020-01-31]}", "'s.yaml', expected values that an option takes"),
    "a date that is none": ("experiment: e.yaml\ngrid: {seeds: [2020-13-45]}", "month must be in 1..12"),
    "a list as a key": ("experiment: e.yaml\ngrid: {[1, 2]: [1]}", "unhashable key"),
    "bytes": ("experiment: e.yaml\ngrid: {seeds: [!!binary aGk=]}", "expected values that an option takes"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line_before_anything_is_run(
    case: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    changes, wanted = MISTAKES[case]
    if isinstance(changes, str):
        Path("s.yaml").write_text(changes)
    else:
        write_sweep(Path("s.yaml"), config, **changes)
    assert main(["sweep", "s.yaml"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("coin: error: ")
    assert len(error.splitlines()) == 1
    assert wanted in error
    assert not Path("runs").exists()


def test_file_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "none.yaml"]) == 2
    assert capsys.readouterr().err.startswith("coin: error: cannot read 'none.yaml' (No such file or directory)")


def test_an_agent_of_a_wandb_sweep_runs_our_command(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {"seeds": [3], "calibration.samples_per_task": 9, "methods": [{"class_path": "Coin"}], "expert.lr": 0.5}
    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})["args"]
    command = create_sweep_command(["coin", "run", "-c", str(config), "${args}"])
    place = command.index("${args}")
    with pytest.raises(SystemExit) as stop:
        main([*command[1:place], *arguments, "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["seeds"], printed["calibration"]["samples_per_task"], printed["expert"]["lr"]) == ([3], 9, 0.5)
    assert [method["class_path"].rsplit(".")[-1] for method in printed["methods"]] == ["Coin"]


def test_points_are_tagged_with_their_sweep_for_w_and_b_and_run_where_they_are_asked_to(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[Any], Launch]] = []

    def run_commands(commands: list[Any], launch: Launch, *_: Any, share_gpus: bool) -> list[Any]:
        assert not share_gpus
        started.append((commands, launch))
        return []

    monkeypatch.setattr(coin.commands.sweep_run, "run_commands", run_commands)
    monkeypatch.setattr(coin.commands.sweep, "cores", lambda: 7)
    monkeypatch.setenv("WANDB_TAGS", "mine")
    arguments = [str(write_sweep(tmp_path / "grid.yaml", config)), f"--output={tmp_path}"]
    for more in ([], ["--launch.workers=2"], ["--jobs=4", "--executor=slurm"]):
        assert main(["sweep", *arguments, *more]) == 0
    commands = started[0][0]
    assert [command.name for command in commands] == NAMES
    assert {command.variables["WANDB_TAGS"] for command in commands} == {"mine,sweep-grid"}
    assert [(launch.executor, launch.workers) for _, launch in started] == [("local", 3), ("local", 2), ("slurm", 4)]


def test_a_point_whose_options_have_changed_is_not_finished(config: Path, tmp_path: Path) -> None:
    def key(**changes: Any) -> str:
        file = write_sweep(tmp_path / "grid.yaml", config, set={**SWEEP["set"], **changes})
        return PointRun(sweep_points(read_sweep(file), tmp_path / "grid")[0], {}).inputs.key

    changes: list[dict[str, Any]] = [
        {},
        {"replicas": [{"bits": 3}]},
        {"replicas": [{"bits": 4}]},
        {"code": [[0.5, 0.5]]},
    ]
    assert len({key(**each) for each in changes}) == len(changes)


def test_table_holds_every_points_results(swept: Path) -> None:
    frame = pd.read_csv(swept / "sweep.csv", keep_default_na=False)
    assert list(frame.columns) == ["calibration.samples_per_task", "seeds", *COLUMNS]
    assert list(dict.fromkeys(frame.experiment)) == NAMES
    assert (frame["calibration.samples_per_task"] == frame.samples_per_task).all()
    assert (frame.seeds == "[" + frame.seed.astype(str) + "]").all()
    for name, rows in frame.groupby("experiment"):
        results = pd.read_csv(next((swept / str(name)).glob("seed-*/results.csv")), keep_default_na=False)
        pd.testing.assert_frame_equal(rows[list(COLUMNS)].reset_index(drop=True), results)
    assert set(frame.method) == {"average", "oracle", "none"}
    risk = pd.read_csv(swept / "risk.csv", keep_default_na=False)
    assert list(risk.columns) == ["calibration.samples_per_task", "seeds", *RISK_COLUMNS]
    assert len(risk) == sum(len(pd.read_csv(path)) for path in swept.glob("*/seed-*/risk.csv"))


def test_report_shows_the_swept_samples(swept: Path) -> None:
    page = (swept / "report.html").read_text()
    assert "coin: sweep grid" in page
    assert "coin sweep grid.yaml" in page
    assert (swept / "plots/nda_against_samples.png").is_file()
    assert "samples_per_task: 12, 24" in page
    assert "Task letters lost" in page  # of the points with the most samples
    again = read_sweep(swept / "sweep.yaml")
    assert (again.name, again.grids) == ("grid", [SWEEP["grid"]])


def test_base_and_experts_are_trained_once(swept: Path) -> None:
    files = {name: sorted((swept / name).rglob("*.safetensors")) for name in NAMES}
    assert len({path.stat().st_ino for name in NAMES for path in files[name] if path.name == "base.safetensors"}) == 1
    experts = [path for name in NAMES for path in files[name] if path.name == "expert.safetensors"]
    assert len(experts) == 8
    assert len({path.stat().st_ino for path in experts}) == 4  # two tasks by two seeds
    logs = [(swept / name / "sweep.log").read_text() for name in NAMES]
    assert sum(log.count("base: pretraining") for log in logs) == 1
    assert sum(log.count("fine-tuning") for log in logs) == 4
    assert sum(len(re.findall(r"expert \w+: up to date", log)) for log in logs) == 4
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
    with folder_lock(swept):
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
    assert list(cells) == ["samples_per_task", "method", "linear", "ridge"]
    assert cells["samples_per_task"] == ["12", "12", "24", "24"]
    assert cells["method"] == ["average", "none"] * 2
    for line, samples in ((0, 12), (2, 24)):
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
    grid = {"calibration.samples_per_task": [12], "seeds": [[0], [1]]}
    file = write_sweep(tmp_path / "grid.yaml", config, grid=grid)
    folder = tmp_path / "grid"
    command = [sys.executable, "-m", "coin", "sweep", str(file), f"--output={tmp_path}", "--jobs=1"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # SIGTERM ends the point's process as well.
    process = subprocess.Popen(command, **quiet)
    wait_for((folder / NAMES[0] / "base/checkpoints/step-key").exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    with folder_lock(folder / NAMES[0]):
        pass
    # SIGKILL leaves it working, and a second process must not work beside it.
    process = subprocess.Popen(command, **quiet)
    wait_for((folder / NAMES[1] / "seed-1/experts/digits/checkpoints/step-key").exists, process)
    orphan = int((folder / NAMES[1] / ".lock").read_text().split()[1])
    os.kill(orphan, signal.SIGSTOP)
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
        with pytest.raises(ConfigurationError, match="at work"), folder_lock(folder / NAMES[1]):
            pass
        assert set(pd.read_csv(folder / "sweep.csv").experiment) == {NAMES[0]}
        first = (folder / NAMES[0] / "seed-0/results.csv").stat().st_mtime_ns
        process = subprocess.Popen(command, **quiet)
        log = folder / NAMES[1] / "sweep.log"
        wait_for(lambda: f"waiting for another coin command at work in '{log.parent}'" in log.read_text(), process)
    finally:
        os.kill(orphan, signal.SIGCONT)
    assert process.wait(240) == 0
    assert (folder / NAMES[0] / "seed-0/results.csv").stat().st_mtime_ns == first
    assert log.read_text().count("expert digits: fine-tuning") == 1
    own, wanted = (
        pd.read_csv(path / "sweep.csv").drop(columns=["merge_seconds", "decoder_seconds"]) for path in (folder, swept)
    )  # fmt: skip
    pd.testing.assert_frame_equal(own, wanted[wanted.experiment.isin(NAMES[:2])])


def test_failing_point_leaves_the_others_alone(
    swept: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bases = [
        {"task": None, "checkpoint": str(folder / "base/base.safetensors")} for folder in (tmp_path, swept / NAMES[0])
    ]
    (tmp_path / "base").mkdir()
    (tmp_path / "base/base.safetensors").write_text("damaged")
    file = write_sweep(tmp_path / "grid.yaml", config, grid={"base": bases})
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
    assert "jobs=0" in capsys.readouterr().err


ROOT = Path(__file__).parents[2]
FAKE_SBATCH = ROOT / "tests/cluster/fake_sbatch.py"
SLURM = {
    "sbatch": f'exec {sys.executable} {FAKE_SBATCH} sbatch "$@"',
    "sacct": f'exec {sys.executable} {FAKE_SBATCH} sacct "$@"',
    "srun": """
while [ "${1#-}" != "$1" ]; do
  case "$1" in --*=*|--unbuffered) ;; --*) shift ;; esac
  shift
done
exec "$@" 2>>$FAKE_SLURM/said-${SLURM_JOB_ID}_$SLURM_ARRAY_TASK_ID
""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a login node."""
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name, lines in SLURM.items():
        (fakes / name).write_text(f"#!/bin/sh\n{lines}\n")
        (fakes / name).chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "WANDB"))}
    path = f"{fakes}:{os.environ['PATH']}"
    return own | {"PATH": path, "PYTHONPATH": str(ROOT), "FAKE_SLURM": str(tmp_path), "WANDB_MODE": "disabled"}


def test_the_state_of_a_job_that_the_cluster_ended_is_told(
    cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text("import os; os.kill(os.getppid(), 9)")
    ended = Command("ended", ["--help"], tmp_path / "a/ended.log", {"PYTHONPATH": f"{tmp_path}/site:{ROOT}"})
    wrong = Command("wrong", ["nonsense"], tmp_path / "b/wrong.log")
    right = Command("right", ["--help"], tmp_path / "c/right.log")
    failed = run_commands([ended, wrong, right], Launch(Executor.slurm, 2, {"timeout_min": 5}), tmp_path / "submitit")
    assert failed == [ended, wrong]
    told = capsys.readouterr().err
    state = f"job 7700_0 ended without a result, in state FAILED; see {tmp_path}/submitit/7700_0_0_log.err"
    assert f"ended: failed: {state}\n" in told
    assert "wrong: failed: coin: error: found command 'nonsense'" in told
    assert "right: finished\n" in told
    with pytest.raises(CoinError, match=r"2 of 3 steps failed, the first of them ended: job 7700_0 ended without"):
        raise_for(failed, 3, "steps")


def test_a_sweep_of_six_points_goes_on_where_it_was_killed(
    config: Path, cluster: dict[str, str], tmp_path: Path
) -> None:
    document = {
        "name": "grid",
        "experiment": str(config),
        "grid": {"seeds": [[0], [1], [2]], "calibration.samples_per_task": [12, 24]},
        "set": {"methods": [{"class_path": "Average"}], "decoders": ["linear"], "calibration.batch_size": 12},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    command = [sys.executable, "-m", "coin", "sweep", "grid.yaml", "--output=runs", "--jobs=2"]
    command += ["--launch.executor=slurm", "--launch.slurm.timeout_min=5"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    sweep = subprocess.Popen(command, cwd=tmp_path, env=cluster, **quiet)
    table = tmp_path / "runs/grid/sweep.csv"
    wait_for(table.exists, sweep)
    sweep.kill()
    sweep.wait()
    array = int((tmp_path / "array-7700").read_text())
    os.kill(array, signal.SIGSTOP)  # and its jobs with it: none of them ends or begins meanwhile
    for task in tmp_path.glob("task-*"):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if not (tmp_path / f"ended-{task.name.removeprefix('task-')}").exists():
                os.killpg(int(task.read_text()), signal.SIGKILL)
    os.kill(array, signal.SIGKILL)
    results = tmp_path / "runs/grid"
    before = {path: path.stat().st_mtime_ns for path in results.glob("*/seed-*/results.csv")}
    assert 0 < len(before) < 6
    done = subprocess.run(command, cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, "\n".join(
        [done.stderr, *(f"{path.name}:\n{path.read_text()}" for path in sorted(tmp_path.glob("said-*")))]
    )
    assert "6 points, " in done.stderr
    assert pd.read_csv(table).experiment.nunique() == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = subprocess.run(command, cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=100, check=True)
    assert "6 finished already" in again.stderr
