"""``coin`` on a real SLURM."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

ROOT = Path(__file__).parents[3]


def squeue(environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        ["squeue", "-h", "-o", "%i"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.fixture
def login(slurm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a login node."""
    monkeypatch.chdir(tmp_path)
    return slurm | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def command(what: str, *options: str) -> list[str]:
    slurm = "--launch.slurm={timeout_min: 9, cpus_per_task: 1}"
    return [
        sys.executable,
        "-m",
        "coin",
        what,
        *options,
        "--launch.cluster=slurm",
        "--launch.workers=2",
        slurm,
    ]


@pytest.mark.slow
def test_three_seeds_killed_three_times_are_those_of_one_run(
    config: Path, login: dict[str, str], tmp_path: Path
) -> None:
    """The driver is killed; its jobs go on, are waited for by the next, and nothing is computed twice."""
    options = [
        "-c",
        str(config),
        "--seeds=[0,1,2]",
        "--methods=[{class_path: Average}]",
        "--decoders=[linear]",
    ]
    run = command("run", *options)

    def finished() -> dict[str, int]:
        return {
            path.parent.name: path.stat().st_mtime_ns
            for path in Path("runs").glob(".steps/*/done.json")
        }

    log = (tmp_path / "driver.log").open("w+")
    quiet: dict[str, Any] = {"stdout": log, "stderr": log}
    for wanted in (2, 5, 9):
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
    assert len(finished()) == 3 + 3 * 5 + 1
    jobs = Path("runs/.steps/.jobs")
    assert len(list(jobs.glob("*_submitted.pkl"))) == 1 + 3 * 4  # no step was submitted twice
    told = "".join(path.read_text() for path in jobs.glob("*.err"))
    for task in ("digits", "letters"):
        assert told.count(f"expert {task}: training") == 3  # nor begun
    here = [
        each
        for each in command("run", *options, "--output=here")
        if not each.startswith("--launch")
    ]
    subprocess.run(here, env=login, check=True, timeout=600, **quiet)
    columns = ["merge_seconds", "decoder_seconds"]
    for seed in (0, 1, 2):
        tables = [
            pd.read_csv(f"{place}/tiny/seed-{seed}/results.csv") for place in ("runs", "here")
        ]
        pd.testing.assert_frame_equal(
            *(table.drop(columns=columns) for table in tables), check_exact=True
        )
    assert not squeue(login)


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--signal=KILL", "--full"]], ids=["cancelled", "killed"])
def test_a_job_that_has_ended_early_is_told_of(
    how: list[str], config: Path, login: dict[str, str], tmp_path: Path
) -> None:
    """Those that depend on it do not wait for ever."""
    run = command("run", "-c", str(config))
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
