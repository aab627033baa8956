"""``coin`` on a real SLURM."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
ON_SLURM = [
    "--launch.cluster=slurm",
    "--launch.workers=2",
    "--launch.slurm={timeout_min: 9, cpus_per_task: 1}",
]


def squeue(environment):
    command = ["squeue", "-h", "-o", "%i"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture
def login(slurm, tmp_path, monkeypatch):
    """The environment of a login node."""
    monkeypatch.chdir(tmp_path)
    return slurm | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def finished():
    """Return the steps that are done, with the times of their files."""
    files = Path("runs/.steps").glob("*/done.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in files}


def killed_after(steps, run, environment):
    """Run a command until so many steps are done, and kill it."""
    with Path("driver.log").open("w+") as log:
        process = subprocess.Popen(run, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while len(finished()) < steps:
            told = Path("driver.log").read_text()[-3000:]
            assert process.poll() is None, f"the run ended before it could be killed: {told}"
            assert time.monotonic() < deadline, f"the run did not come so far: {told}"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(60)


def results(folder, seed):
    table = pd.read_csv(f"{folder}/tiny/seed-{seed}/results.csv")
    return table.drop(columns=["merge_seconds", "decoder_seconds"])


def test_three_seeds_killed_three_times_are_those_of_one_run(config, login):
    """The driver is killed; its jobs go on, are waited for by the next, and nothing is computed twice."""
    options = ["--seeds=[0,1,2]", "--methods=[{class_path: Average}]", "--decoders=[linear]"]
    here = [sys.executable, "-m", "coin", "run", "-c", str(config), *options]
    run = [*here, *ON_SLURM]
    for steps in (2, 5, 9):
        before = finished()
        killed_after(steps, run, login)
        assert before.items() <= finished().items()
    done = subprocess.run(run, env=login, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(finished()) == 3 + 3 * 5 + 1
    jobs = Path("runs/.steps/.jobs")
    assert len(list(jobs.glob("*_submitted.pkl"))) == 1 + 3 * 4  # no step was submitted twice
    told = "".join(path.read_text() for path in jobs.glob("*.err"))
    for task in ("digits", "letters"):
        assert told.count(f"expert {task}: training") == 3  # nor begun
    subprocess.run([*here, "--output=here"], env=login, check=True, timeout=600)
    for seed in (0, 1, 2):
        pd.testing.assert_frame_equal(
            results("runs", seed), results("here", seed), check_exact=True
        )
    assert not squeue(login)


@pytest.mark.parametrize("how", [[], ["--signal=KILL", "--full"]], ids=["cancelled", "killed"])
def test_a_job_that_has_ended_early_is_told_of(how, config, login):
    """Those that depend on it do not wait for ever."""
    run = [sys.executable, "-m", "coin", "run", "-c", str(config), *ON_SLURM]
    process = subprocess.Popen(
        run, env=login, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 120
    while len(squeue(login)) < 2:  # an array that waits is one line
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(2)
    first = min(squeue(login), key=lambda job: int(job.partition("_")[0]))
    subprocess.run(["scancel", *how, first], env=login, check=True)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "steps are not done, the first of them base: job " in told.strip().splitlines()[-1]
    assert not squeue(login)
