"""A sweep whose points are jobs of a cluster: killed, and gone on with."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "sbatch": f'exec {sys.executable} {Path(__file__).with_name("fake_sbatch.py")} sbatch "$@"',
    "sacct": f'exec {sys.executable} {Path(__file__).with_name("fake_sbatch.py")} sacct "$@"',
    "srun": """
while [ "${1#-}" != "$1" ]; do
  case "$1" in --*=*|--unbuffered) ;; --*) shift ;; esac
  shift
done
exec "$@"
""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a login node."""
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name, lines in COMMANDS.items():
        (fakes / name).write_text(f"#!/bin/sh\n{lines}\n")
        (fakes / name).chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "WANDB"))}
    path = f"{fakes}:{os.environ['PATH']}"
    return own | {"PATH": path, "PYTHONPATH": str(ROOT), "FAKE_SLURM": str(tmp_path), "WANDB_MODE": "disabled"}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.05)


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
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    sweep = subprocess.Popen(command, cwd=tmp_path, env=cluster, **quiet)
    table = tmp_path / "runs/grid/sweep.csv"
    wait_for(table.exists)
    sweep.kill()
    sweep.wait()
    for task in tmp_path.glob("task-*"):  # and its jobs with it
        name = task.name.removeprefix("task-")
        if not (tmp_path / f"ended-{name}").exists():
            os.killpg(int(task.read_text()), signal.SIGKILL)
    results = tmp_path / "runs/grid"
    before = {path: path.stat().st_mtime_ns for path in results.glob("*/seed-*/results.csv")}
    assert 0 < len(before) < 6
    done = subprocess.run(command, cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 points, " in done.stderr
    assert pd.read_csv(table).experiment.nunique() == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = subprocess.run(command, cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=100, check=True)
    assert "6 finished already" in again.stderr
