"""Steps as jobs of their own, on this machine and of SLURM, and what becomes of those that fail."""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coin.cli import main
from coin.errors import CoinError, ConfigurationError
from coin.files.safetensors import load_state
from coin.pipeline.pool import Job, Launch, check_launch, run_as_jobs, stages
from coin.pipeline.step import Step
from tests.pipeline.jobs import finish

LOCAL = Launch("local", 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Touch(Step):
    """A step that another process finishes."""

    parts: tuple["Touch", ...] = ()
    here: bool = False

    @property
    def remote(self) -> bool:  # type: ignore[override]
        return not self.here

    def run(self) -> None:
        raise NotImplementedError


@pytest.fixture
def planned(tmp_path: Path) -> dict[str, Step]:
    """A step here, then three elsewhere, the second of which fails, then one that needs all and one that needs two."""
    steps: dict[str, Step] = {}

    def add(name: str, *parts: str, here: bool = False) -> None:
        needed = tuple(steps[part] for part in parts)
        store = tmp_path / ".steps"
        steps[name] = Touch(name=name, what=name, store=store, parts=needed, here=here)

    add("first", here=True)
    for name in ("a", "wrong", "c"):
        add(name, "first")
    add("all", "a", "wrong", "c")
    add("two", "a", "c", here=True)
    add("last", "two")  # by way of one that is not remote
    return steps


@pytest.fixture
def experiment(tmp_path: Path) -> Any:
    return SimpleNamespace(
        name="x", seeds=[0], folder=tmp_path / "x", trainer={}, of_seeds=lambda _: {}
    )


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six cores and two GPUs, and what jobs of this machine need to find their function."""
    monkeypatch.setattr("coin.pipeline.pool.cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("JOB_SECONDS", "0.2")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def test_a_stage_needs_earlier_ones_alone(planned: dict[str, Step]) -> None:
    def names() -> list[list[str]]:
        found = stages(planned.values())
        return [[step.name for step in stage] for stage in found]

    assert names() == [["a", "wrong", "c"], ["all", "last"]]
    done = planned["wrong"]
    done.folder.mkdir(parents=True)
    done.finish(1.0)
    assert names() == [["a", "c"], ["all", "last"]]


@pytest.mark.usefixtures("jobs")
def test_jobs_that_fail_stop_the_next_stage_and_each_has_its_share_of_the_machine(
    planned: dict[str, Step], experiment: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = r"3 of 5 steps are not done, the first of them wrong: job \d+: ValueError: the last word of wrong-"
    with pytest.raises(CoinError, match=expected):
        run_as_jobs(experiment, planned.values(), LOCAL, finish)
    assert [step.name for step in planned.values() if step.is_done] == ["a", "c"]
    assert (planned["a"].folder / "threads").read_text() == "3"
    gpus = {name: (planned[name].folder / "gpus").read_text() for name in ("a", "wrong", "c")}
    assert gpus == {"a": "5", "wrong": "7", "c": "5"}
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in lines] == ["a", "c", "wrong"]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return "Z" not in Path(f"/proc/{process}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.usefixtures("jobs")
def test_jobs_of_this_machine_end_with_the_command_and_share_too_few_gpus(
    planned: dict[str, Step], experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_SECONDS", "600")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")

    def processes() -> list[int]:
        texts = [path.read_text() for path in tmp_path.glob(".steps/*/process")]
        return [int(text) for text in texts if text]

    def interrupted(_: object) -> None:
        while len(processes()) < 2:
            threading.Event().wait(0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr("submitit.core.core.Job.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_as_jobs(experiment, planned.values(), LOCAL, finish)
    given = [path.read_text() for path in tmp_path.glob(".steps/*/gpus")]
    assert given == ["5", "5"]
    deadline = time.monotonic() + 30
    while any(map(is_alive, processes())):
        assert time.monotonic() < deadline
        threading.Event().wait(0.2)


SLURM = {
    "srun": "",
    "sbatch": "number=$(($(ls {0}/submitted | wc -l) + 1)); cp $1 {0}/submitted/$number; "
    "echo Submitted batch job $number",
    "squeue": "cat {0}/queue; : > {0}/queue",  # what waits has ended when one looks again
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A cluster that runs nothing; a function that returns the scripts that were submitted to it."""
    folder = tmp_path / "slurm"
    (folder / "submitted").mkdir(parents=True)
    (folder / "queue").touch()
    for name, script in SLURM.items():
        (folder / name).write_text(f"#!/bin/sh\n{script.format(folder)}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def submitted() -> list[str]:
        numbers = sorted((folder / "submitted").iterdir(), key=lambda path: int(path.name))
        return [path.read_text() for path in numbers]

    return submitted


def test_a_stage_is_an_array_after_the_earlier_ones_and_what_is_queued_is_not_submitted_again(
    planned: dict[str, Step], experiment: Any, slurm: Callable[[], list[str]], tmp_path: Path
) -> None:
    launch = Launch("slurm", 2, {"slurm_additional_parameters": {"account": "mine"}})
    expected = "5 of 5 steps are not done, the first of them a: job 1_0: cancelled or killed"
    with pytest.raises(CoinError, match=expected):
        run_as_jobs(experiment, planned.values(), launch, finish)
    first, second = slurm()
    assert "--array=0-2%2" in first
    assert "--dependency" not in first
    assert "--dependency=afterok:1_0:1_1:1_2\n" in second
    assert "--kill-on-invalid-dep=yes\n" in second
    assert "--account=mine\n" in second
    (tmp_path / "slurm/queue").write_text("1_0\n1_1\n")
    with pytest.raises(CoinError, match="5 of 5 steps are not done"):
        run_as_jobs(experiment, planned.values(), launch, finish)
    *_, third, fourth = slurm()
    assert "--array" not in third  # one step
    assert "--dependency=afterok:1_0:1_1:3\n" in fourth


def test_where_jobs_are_submitted_no_gpu_is_needed(
    config: Path,
    slurm: Callable[[], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = ["--launch.cluster=slurm", "--trainer={accelerator: gpu}"]
    assert main(["run", "-c", str(config), f"--output={tmp_path}", *options]) == 2
    assert "steps are not done, the first of them base: job 1: cancelled" in capsys.readouterr().err
    assert len(slurm()) > 3


def test_what_submitit_requeues_is_the_same_job(tmp_path: Path) -> None:
    job = Job(finish, tmp_path, ["a"])
    assert job.checkpoint().function == job


REFUSED = {
    "no worker": ({"workers": 0}, "workers=0"),
    "workers of nothing": ({"workers": 2}, "launch.workers=2 and no launch.cluster; set "),
    "SLURM's options here": (
        {"cluster": "local", "slurm": {"timeout_min": 9}},
        "found launch.slurm and launch.cluster=local; set",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_section_that_means_nothing_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        Launch(**options)


@pytest.mark.parametrize("count", [{"devices": 2}, {"num_nodes": 2}, {"devices": [0, 1]}])
def test_jobs_of_several_processes_are_refused(count: dict[str, Any], experiment: Any) -> None:
    experiment.trainer = count
    with pytest.raises(ConfigurationError, match="that share every training, and a launch section"):
        check_launch(experiment, LOCAL)


@pytest.mark.parametrize("devices", ["auto", 1, "1", [0], -1])
def test_a_device_that_each_job_finds_is_no_several_processes(
    devices: Any, experiment: Any
) -> None:
    experiment.trainer = {"devices": devices}
    check_launch(experiment, LOCAL)


def test_processes_that_would_each_submit_jobs_are_refused(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="found 2 processes that share every training"):
        check_launch(experiment, LOCAL)


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_option_that_submitit_does_not_know_is_told_before_anything_runs(
    more: list[str], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--launch.cluster=slurm", "--launch.slurm={timeout_mni: 9}", *more]
    assert main(["run", "-c", str(config), f"--output={tmp_path}", *options]) == 2
    assert "cannot submit jobs with {'timeout_mni': 9}" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/initial*"))


def test_what_is_not_installed_is_named(
    experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="found no srun on this machine"):
        check_launch(experiment, Launch("slurm"))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigurationError, match=r"pip install '\.\[slurm\]'"):
        check_launch(experiment, LOCAL)


@pytest.mark.slow
@pytest.mark.usefixtures("no_reports")
def test_an_experiment_by_jobs_of_this_machine_is_that_of_one_process(
    finished: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = ["--launch.cluster=local", "--launch.workers=2"]
    methods = "--methods=[{class_path: Average}, {class_path: Coin}]"
    command = ["run", "-c", str(config), f"--output={tmp_path}", methods, *launch]
    assert main(command) == 0
    for task in ("digits", "letters"):
        place = f"seed-0/statistics/{task}.fisher.safetensors"
        expected, _ = load_state(finished / place)
        found, _ = load_state(tmp_path / "tiny" / place)
        assert all(found[name].equal(value) for name, value in expected.items())
    assert (tmp_path / "tiny/seed-0/results.csv").is_file()
    folders = [file.parent.name for file in (tmp_path / ".steps").glob("*/job")]
    submitted = {folder.rpartition("-")[0] for folder in folders}
    assert submitted >= {"base", "expert-digits", "fisher-letters", "evaluate"}
    assert "report" not in submitted
    assert not any(name.startswith("initial") for name in submitted)
    capsys.readouterr()
    assert main(command) == 0
    assert "job" not in capsys.readouterr().err
