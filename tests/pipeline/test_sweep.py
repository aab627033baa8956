"""``coin sweep``: its points, what they share, its table, and what happens when it is killed or a point fails."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from coin.cli import main
from coin.pipeline.sweep import SweepPoint, read_sweep, sweep_points
from coin.reporting import read_results
from coin.reporting.results import COLUMNS

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
    assert main(["sweep", str(file), f"--output={folder}", "--launch.workers=2"]) == 0
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
    "unknown key": ({"girt": {}}, "expected a sweep with name: a plain folder name, experiment: a file or several"),
    "no grid": ({"grid": {}}, "grid: dotted keys of an experiment, each with a list of values"),
    "a list of no grids": ({"grid": [1]}, "expected a sweep with"),
    "grids of other keys": ({"grid": [{"seeds": [[0]]}, {"base.seed": [1]}]}, "with the same keys"),
    "a list for set": ({"set": [1]}, "set: dotted keys, each with a value"),
    "a name that leads out": ({"name": ".."}, "'name': '..'"),
    "no experiment": ({"experiment": None}, "expected a sweep with"),
    "an experiment that is not there": ({"experiment": ["none.yaml"]}, "none.yaml"),
    "the name is swept": ({"grid": {"name": ["a"]}}, "'name'"),
    "one expert alone": ({"set": {"only": "digits"}}, "'only'"),
    "no list": ({"grid": {"seeds": 3}}, "expected a sweep with"),
    "no value": ({"grid": {"seeds": []}}, "expected a sweep with"),
    "a number as a key": ({"grid": {7: [1]}}, "7"),
    "an option of no experiment": ({"grid": {"expert.speed": [1]}}, "speed"),
    "sections that do not fit": ({"grid": {"base": [{"checkpoint": __file__}]}}, "both or neither"),
    "a value that no experiment takes": ({"grid": {"calibration.samples_per_task": [9, 0]}}, "0"),
    "cut off": ("a: [", "cannot use 's.yaml' as YAML"),
    "empty": ("", "found no keys in 's.yaml'"),
    "a list as a key": ("experiment: e.yaml\ngrid: {[1, 2]: [1]}", "unhashable key"),
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


def test_report_shows_the_swept_samples(swept: Path) -> None:
    page = (swept / "report.html").read_text()
    assert "coin: sweep grid" in page
    assert "coin sweep grid.yaml" in page
    assert (swept / "plots/nda_against_calibration-samples_per_task.png").is_file()
    again = read_sweep(swept / "sweep.yaml")
    assert (again.name, again.grids) == ("grid", [SWEEP["grid"]])


def test_what_points_share_is_made_once_and_tagged_with_the_sweep(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [path.parent.name.rpartition("-")[0] for path in (swept / ".steps").glob("*/done.json")]
    counts = {name: made.count(name) for name in made}
    # Two seeds; calibration samples differ, so coded models do not share.
    once = dict.fromkeys(("base", "initial-10", "initial-6"), 1)
    assert counts == {**once, "expert-digits": 2, "expert-letters": 2, "coded-average": 4, "evaluate": 4}
    experts = {(swept / name / "seed-0/experts/digits").resolve() for name in NAMES if name.endswith("0")}
    assert len(experts) == 1
    assert main(["sweep", str(swept.parent / "grid.yaml"), f"--output={swept.parent}", "--dry-run"]) == 0
    assert "grid, 4 points: 0 of 15 steps to do" in capsys.readouterr().out


def test_finished_sweep_computes_nothing(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [path for path in swept.rglob("*") if path.is_file() and ".locks" not in path.parts]
    before = {path: path.stat().st_mtime_ns for path in steps if path.name not in ("summary.csv", "sweep.csv")}
    assert main(["sweep", str(swept.parent / "grid.yaml"), f"--output={swept.parent}"]) == 0
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if before[path] != after[path]} <= {
        "sweep.yaml", "promise.csv", "report.html", *(path.name for path in (swept / "plots").glob("*"))
    }  # fmt: skip
    assert capsys.readouterr().err.count("up to date") == 15


def finished_steps(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob(".steps/*/done.json")}


def kill_and_go_on(command: list[str], folder: Path, kills: int, environment: dict[str, str] | None = None) -> str:
    """Start a sweep, kill it after each few steps, and let it end; return what the last one says.

    Nothing that is finished when it is killed may be made again.
    """
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    for kill in range(kills):
        before = finished_steps(folder)
        process = subprocess.Popen(command, **quiet)
        deadline = time.monotonic() + 240
        wanted = len(before) + 1 + 2 * kill
        while len(finished_steps(folder)) < wanted:
            assert process.poll() is None, "the sweep ended before it could be killed"
            assert time.monotonic() < deadline, "the sweep did not come so far"
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM if kill == 1 else signal.SIGKILL)
        assert process.wait(60) != 0
        found = finished_steps(folder)
        assert before.items() <= found.items()
    before = finished_steps(folder)
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert before.items() <= finished_steps(folder).items()
    return done.stderr


def test_six_points_killed_three_times_are_those_of_one_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    grid = {"calibration.samples_per_task": [12, 24], "seeds": [[0], [1], [2]]}
    file = write_sweep(tmp_path / "grid.yaml", config, grid=grid)
    tables = []
    for place, kills in (("whole", 0), ("killed", 3)):
        command = [sys.executable, "-m", "coin", "sweep", str(file), f"--output={tmp_path / place}"]
        kill_and_go_on(command, tmp_path / place / "grid", kills)
        steps = finished_steps(tmp_path / place / "grid")
        assert len(steps) == 3 + 2 * 3 + 6 + 6
        table = pd.read_csv(tmp_path / place / "grid/sweep.csv")
        tables.append(table.drop(columns=["merge_seconds", "decoder_seconds"]))
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_failing_point_leaves_the_others_alone(
    swept: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (str(folder / "base/base.safetensors") for folder in (tmp_path, swept / NAMES[0]))
    bases = [{"task": None, "checkpoint": file} for file in files]
    (tmp_path / "base").mkdir()
    (tmp_path / "base/base.safetensors").write_text("damaged")
    file = write_sweep(tmp_path / "grid.yaml", config, grid={"base": bases})
    assert main(["sweep", str(file), f"--output={tmp_path}"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("coin: error: 1 of 12 steps failed, the first of them initialisation for 10 classes: ")
    assert str(tmp_path / "base/base.safetensors") in line
    frame = pd.read_csv(tmp_path / "grid/sweep.csv")
    assert set(frame.experiment) == {"grid-001-base-1"}
    assert set(frame.base.map(json.loads).map(lambda base: base["checkpoint"])) == {bases[1]["checkpoint"]}
    assert len(frame) == len(read_results(tmp_path / "grid/grid-001-base-1/seed-0"))
