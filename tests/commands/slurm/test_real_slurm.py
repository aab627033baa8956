"""``coin`` on a real SLURM."""

import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from coin.reporting import read_results

ROOT = Path(__file__).parents[3]


def squeue(environment: dict[str, str]) -> list[str]:
    done = subprocess.run(["squeue", "-h", "-o", "%i"], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture
def login(slurm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a login node."""
    monkeypatch.chdir(tmp_path)
    return slurm | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def command(what: str, *options: str) -> list[str]:
    slurm = "--launch.slurm={timeout_min: 9, cpus_per_task: 1}"
    return [sys.executable, "-m", "coin", what, *options, "--launch.executor=slurm", "--launch.workers=2", slurm]


@pytest.mark.slow
def test_three_seeds_killed_three_times_are_those_of_one_run(
    config: Path, login: dict[str, str], tmp_path: Path
) -> None:
    """The driver is killed; its jobs go on, are waited for by the next, and nothing is computed twice."""
    small = ["--methods=[{class_path: Average}]", "--decoders=[linear]", "--seeds=[0, 1, 2]", "--name=three"]
    run = command("run", "-c", str(config), *small)
    folder = tmp_path / "runs"

    def finished() -> dict[str, int]:
        return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob(".steps/*/done.json")}

    log = (tmp_path / "driver.log").open("w+")
    quiet: dict[str, Any] = {"stdout": log, "stderr": log}
    for wanted in (2, 5, 8):
        before = finished()
        process = subprocess.Popen(run, env=login, **quiet)
        deadline = time.monotonic() + 300
        while len(finished()) < wanted:
            told = Path(log.name).read_text()[-3000:]
            assert process.poll() is None, f"the run ended before it could be killed: {told}"
            assert time.monotonic() < deadline, f"the run did not come so far: {told}"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert before.items() <= finished().items()
    done = subprocess.run(run, env=login, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(finished()) == 3 + 2 * 3 + 3 + 3
    for job in folder.glob(".steps/*/launch.log"):  # no step was begun twice
        assert job.read_text().count(f"--only {job.parent.name}") == 1, job
    here = [each for each in run if not each.startswith("--launch")]
    subprocess.run([*here, "--output=here"], env=login, check=True, timeout=600, **quiet)
    columns = ["merge_seconds", "decoder_seconds"]
    for seed in range(3):
        places = [Path(f"{place}/three/seed-{seed}") for place in ("runs", "here")]
        tables = [read_results(place).drop(columns=columns) for place in places]
        pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert not squeue(login)


def test_a_job_that_the_cluster_ends_is_told_of(config: Path, login: dict[str, str], tmp_path: Path) -> None:
    run = command("run", "-c", str(config))
    process = subprocess.Popen(run, env=login, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not (jobs := squeue(login)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(2)
    subprocess.run(["scancel", *jobs], env=login, check=True)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "steps failed, the first of them base: " in told.strip().splitlines()[-1]


def test_a_drained_node_is_told_of_while_it_is_waited_for(config: Path, login: dict[str, str], tmp_path: Path) -> None:
    def node(state: str) -> None:
        update = ["scontrol", "update", f"nodename={platform.node()}", f"state={state}", "reason=broken"]
        subprocess.run(update, env=login, check=True)

    node("drain")
    log = (tmp_path / "driver.log").open("w+")
    process = subprocess.Popen(command("run", "-c", str(config)), env=login, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while "waits for a node: " not in (told := Path(log.name).read_text()):
            assert process.poll() is None, told
            assert time.monotonic() < deadline, told
            time.sleep(0.2)
    finally:
        process.terminate()
        process.wait(60)
        subprocess.run(["scancel", "--me"], env=login, check=True)
        node("resume")
    assert process.returncode == 143
    assert Path(log.name).read_text().count("waits for a node: ") == 1
