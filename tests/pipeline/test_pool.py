"""Steps as jobs of their own, on this machine and of SLURM, and what becomes of those that fail."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest

from coin.errors import CoinError, ConfigurationError
from coin.files.safetensors import load_state
from coin.pipeline import pool
from coin.pipeline.pool import Job, Launch, check_launch, run_as_jobs
from coin.pipeline.step import Step
from tests.pipeline.jobs import finish

LOCAL = Launch("local", 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Elsewhere(Step):
    """A step that another process finishes."""

    parts: tuple[Step, ...] = ()

    def run(self):
        raise NotImplementedError


class Here(Elsewhere):
    remote = False


NEEDS = {
    "first": [],
    "a": ["first"],
    "wrong": ["first"],  # which fails
    "c": ["first"],
    "all": ["a", "wrong", "c"],
    "two": ["a", "c"],
    "last": ["two"],  # by way of one that is not remote
}


@pytest.fixture
def planned(tmp_path):
    steps = {}
    for name, needs in NEEDS.items():
        kind = Here if name in ("first", "two") else Elsewhere
        parts = tuple(steps[need] for need in needs)
        steps[name] = kind(name=name, what=name, store=tmp_path / ".steps", parts=parts)
    return steps


@pytest.fixture
def experiment(tmp_path):
    return SimpleNamespace(
        name="x", seeds=[0], folder=tmp_path / "x", trainer={}, of_seeds=lambda _: {}
    )


@pytest.fixture
def jobs(monkeypatch):
    """Six cores and two GPUs; jobs that find their function, without importing torch first."""
    monkeypatch.setattr("coin.pipeline.pool.cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("JOB_SECONDS", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    cloudpickle.register_pickle_by_value(pool)
    yield
    cloudpickle.unregister_pickle_by_value(pool)


@pytest.mark.usefixtures("jobs")
def test_jobs_that_fail_stop_the_next_stage_and_each_has_its_share_of_the_machine(
    planned, experiment, capsys
):
    expected = r"3 of 5 steps are not done, the first of them wrong: job \d+: ValueError: the last word of wrong-"
    with pytest.raises(CoinError, match=expected):
        run_as_jobs(experiment, planned.values(), LOCAL, finish)
    assert [step.name for step in planned.values() if step.is_done] == ["a", "c"]
    assert (planned["a"].folder / "threads").read_text() == "3"
    gpus = {name: (planned[name].folder / "gpus").read_text() for name in ("a", "wrong", "c")}
    assert gpus == {"a": "5", "wrong": "7", "c": "5"}
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in lines] == ["a", "c", "wrong"]


def is_alive(process):
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.usefixtures("jobs")
def test_jobs_of_this_machine_end_with_the_command_and_share_too_few_gpus(
    planned, experiment, tmp_path, monkeypatch
):
    monkeypatch.setenv("JOB_SECONDS", "600")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")

    def processes():
        texts = [path.read_text() for path in tmp_path.glob(".steps/*/process")]
        return [int(text) for text in texts if text]

    def interrupted(_):
        while len(processes()) < 2:
            time.sleep(0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr("submitit.core.core.Job.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_as_jobs(experiment, planned.values(), LOCAL, finish)
    assert [path.read_text() for path in tmp_path.glob(".steps/*/gpus")] == ["5", "5"]
    deadline = time.monotonic() + 30
    while any(map(is_alive, processes())):
        assert time.monotonic() < deadline
        time.sleep(0.1)


SLURM = {
    "srun": "",
    "sbatch": "number=$(($(ls {0}/submitted | wc -l) + 1)); cp $1 {0}/submitted/$number; "
    "echo Submitted batch job $number",
    "squeue": "cat {0}/queue; : > {0}/queue",  # what waits has ended when one looks again
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster that runs nothing; a function that returns the scripts that were submitted to it."""
    folder = tmp_path / "slurm"
    (folder / "submitted").mkdir(parents=True)
    (folder / "queue").touch()
    for name, script in SLURM.items():
        (folder / name).write_text(f"#!/bin/sh\n{script.format(folder)}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def submitted():
        numbers = sorted((folder / "submitted").iterdir(), key=lambda path: int(path.name))
        return [path.read_text() for path in numbers]

    return submitted


def test_a_stage_is_an_array_after_the_earlier_ones_of_what_is_neither_done_nor_queued(
    planned, experiment, slurm, tmp_path
):
    launch = Launch("slurm", 2, {"slurm_additional_parameters": {"account": "mine"}})
    expected = "5 of 5 steps are not done, the first of them a: job 1_0: cancelled or killed"
    with pytest.raises(CoinError, match=expected):
        run_as_jobs(experiment, planned.values(), launch, finish)
    first, second = slurm()
    assert "--array=0-2%2" in first
    assert "--dependency" not in first
    assert "--array=0-1%2" in second
    assert "--dependency=afterok:1_0:1_1:1_2\n" in second
    assert "--kill-on-invalid-dep=yes\n" in second
    assert "--account=mine\n" in second
    planned["a"].finish(1.0)
    (tmp_path / "slurm/queue").write_text("1_1\n")
    with pytest.raises(CoinError, match="4 of 4 steps are not done"):
        run_as_jobs(experiment, planned.values(), launch, finish)
    *_, third, fourth = slurm()
    assert "--array" not in third  # one step
    assert "--dependency=afterok:1_1:3\n" in fourth


def test_where_jobs_are_submitted_no_gpu_is_needed(run, slurm, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run("--launch.cluster=slurm", "--trainer={accelerator: gpu}") == 2
    assert "steps are not done, the first of them base: job 1: cancelled" in capsys.readouterr().err
    assert len(slurm()) > 3


def test_what_submitit_requeues_is_the_same_job(tmp_path):
    job = Job(finish, tmp_path, ["a"])
    assert job.checkpoint().function == job


REFUSED = [
    ({"workers": 0}, "workers=0"),
    ({"workers": 2}, "launch.workers=2 and no launch.cluster; set "),
    (
        {"cluster": "local", "slurm": {"timeout_min": 9}},
        "found launch.slurm and launch.cluster=local",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_a_section_that_means_nothing_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Launch(**options)


@pytest.mark.parametrize(
    ("running", "trainer"),
    [("2", {}), ("1", {"devices": 2}), ("1", {"num_nodes": 2}), ("1", {"devices": [0, 1]})],
)
def test_jobs_of_several_processes_are_refused(running, trainer, experiment, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", running)
    experiment.trainer = trainer
    with pytest.raises(ConfigurationError, match="that share every training, and a launch section"):
        check_launch(experiment, LOCAL)


@pytest.mark.parametrize("devices", ["auto", 1, "1", [0], -1])
def test_a_device_that_each_job_finds_is_no_several_processes(devices, experiment):
    experiment.trainer = {"devices": devices}
    check_launch(experiment, LOCAL)


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_option_that_submitit_does_not_know_is_told_before_anything_runs(
    more, run, tmp_path, capsys
):
    assert run("--launch.cluster=slurm", "--launch.slurm={timeout_mni: 9}", *more) == 2
    assert "cannot submit jobs with {'timeout_mni': 9}" in capsys.readouterr().err
    assert not (tmp_path / ".steps").exists()


def test_what_is_not_installed_is_named(experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="found no srun on this machine"):
        check_launch(experiment, Launch("slurm"))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigurationError, match=r"pip install '\.\[slurm\]'"):
        check_launch(experiment, LOCAL)


@pytest.mark.slow
@pytest.mark.usefixtures("no_reports")
def test_an_experiment_by_jobs_of_this_machine_is_that_of_one_process(
    finished, run, tmp_path, capsys
):
    launch = ["--launch.cluster=local", "--launch.workers=2", "--methods=[{class_path: Coin}]"]
    assert run(*launch) == 0
    place = "seed-0/statistics/letters.fisher.safetensors"
    expected, _ = load_state(finished / place)
    found, _ = load_state(tmp_path / "tiny" / place)
    assert all(found[name].equal(value) for name, value in expected.items())
    assert (tmp_path / "tiny/seed-0/results.csv").is_file()
    folders = [file.parent.name for file in (tmp_path / ".steps").glob("*/job")]
    submitted = {folder.rpartition("-")[0] for folder in folders}
    assert submitted >= {"base", "expert-digits", "fisher-letters", "evaluate"}
    assert not [name for name in submitted if name.startswith(("initial", "report"))]
    capsys.readouterr()
    assert run(*launch) == 0
    assert "job" not in capsys.readouterr().err
