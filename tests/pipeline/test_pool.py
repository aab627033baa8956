"""Steps as jobs of their own, on this machine and of SLURM, and what becomes of those that fail."""

import contextlib
import json
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
import torch

import coin.files.safetensors
from coin.cli import main
from coin.errors import CoinError, ConfigurationError
from coin.pipeline.pool import Job, JobsFailedError, Launch, check_launch, run_as_jobs, stages
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
        if "wrong" in self.name:
            raise CoinError("it is wrong; fix it")


@pytest.fixture
def planned(tmp_path: Path) -> list[Step]:
    """A step here, then three elsewhere, the second of which fails, then one that needs all and one that needs two."""
    store = tmp_path / ".steps"

    def make(name: str, **fields: Any) -> Touch:
        return Touch(name=name, what=name, store=store, **fields)

    first = make(name="first", here=True)
    a, wrong, c = (make(name=name, parts=(first,)) for name in ("a", "wrong", "c"))
    return [first, a, wrong, c, make(name="all", parts=(a, wrong, c)), make(name="two", parts=(a, c), here=True)]


EXPERIMENT: Any = SimpleNamespace(name="x", seeds=[0], of_seeds=lambda _: {})


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What jobs of this machine need to find their function."""
    monkeypatch.setenv("JOB_SECONDS", "0.2")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def names(every: list[list[Step]]) -> list[list[str]]:
    return [[step.name for step in stage] for stage in every]


def test_a_stage_needs_earlier_ones_alone(planned: list[Step]) -> None:
    assert names(stages(planned)) == [["a", "wrong", "c"], ["all"]]
    last = Touch(name="last", store=planned[0].store, parts=(planned[5],))  # by way of one that is not remote
    assert names(stages([*planned, last])) == [["a", "wrong", "c"], ["all", "last"]]
    step = planned[2]
    step.folder.mkdir(parents=True)
    step.finish(1.0)
    assert names(stages(planned)) == [["a", "c"], ["all"]]


@pytest.mark.usefixtures("jobs")
def test_jobs_that_have_failed_are_told_of_and_stop_the_next_stage(
    planned: list[Step], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("coin.pipeline.pool.cores", lambda: 6)
    told = r"2 of 4 steps are not done, the first of them wrong: job \d+: ValueError: the last word of wrong-.* \(see "
    with pytest.raises(JobsFailedError, match=told):
        run_as_jobs(EXPERIMENT, planned, LOCAL, finish)
    assert [step.name for step in planned if step.is_done] == ["a", "c"]
    (made,) = planned[1].store.glob("a-*/threads")
    assert made.read_text() == "3"  # the share of one worker of two
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == ["a", "c", "wrong"]


class Inline:
    """An executor that runs jobs at once, and notes what each has."""

    def __init__(self) -> None:
        self.had: list[list[int]] = []

    def update_parameters(self, *, gpus_per_node: int, visible_gpus: list[int]) -> None:
        assert gpus_per_node == len(visible_gpus)
        self.had.append(visible_gpus)

    def submit(self, job: Callable[[], None]) -> SimpleNamespace:
        job()
        return SimpleNamespace(job_id=1, wait=lambda: None, done=lambda: True)


@pytest.mark.usefixtures("jobs")
@pytest.mark.parametrize(
    ("visible", "workers", "shares"),
    [(None, 3, [[0], [1], [0]]), ("5,7", 2, [[5], [7]]), ("5,7", 1, [[5, 7]]), ("", 2, [[], []])],
)
def test_workers_share_the_gpus(
    visible: str | None, workers: int, shares: list[list[int]], planned: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_SECONDS", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if visible == "" else 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    executor = Inline()
    monkeypatch.setattr("coin.pipeline.pool._executor", lambda *_: executor)
    right = [step for step in planned if step.name in ("first", "a", "c")]
    third = Touch(name="d", store=right[0].store)
    run_as_jobs(EXPERIMENT, [*right, third], Launch("local", workers), finish)
    assert executor.had == shares


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
        places = [folder / f"seed-0/statistics/{task}.fisher.safetensors" for folder in (finished, tmp_path / "tiny")]
        one, other = (coin.files.safetensors.load_state(place)[0] for place in places)
        assert all(one[name].equal(other[name]) for name in one)
    assert (tmp_path / "tiny/seed-0/results.csv").is_file()
    submitted = {file.parent.name.rpartition("-")[0] for file in (tmp_path / ".steps").glob("*/job")}
    assert submitted >= {"base", "expert-digits", "fisher-letters", "evaluate"}
    capsys.readouterr()
    assert main(command) == 0
    assert "job" not in capsys.readouterr().err


def is_alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return "Z" not in Path(f"/proc/{process}/stat").read_text()
    return False


@pytest.mark.usefixtures("jobs")
def test_jobs_of_this_machine_end_with_the_command(
    planned: list[Step], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_SECONDS", "600")

    def processes() -> list[int]:
        return [int(path.read_text() or 0) for path in tmp_path.glob(".steps/*/process")]

    def interrupted(_: object) -> None:
        while len(processes()) < 2 or not all(processes()):
            threading.Event().wait(0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr("submitit.core.core.Job.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_as_jobs(EXPERIMENT, planned, LOCAL, finish)
    deadline = time.monotonic() + 30
    while any(map(is_alive, processes())):
        assert time.monotonic() < deadline
        threading.Event().wait(0.2)


def test_what_submitit_requeues_is_the_same_job(tmp_path: Path) -> None:
    job = Job(finish, tmp_path, ["a"])
    assert job.checkpoint().function == job


def test_what_does_not_fit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(launch: Launch, match: str) -> None:
        with pytest.raises(ConfigurationError, match=match):
            check_launch(launch, tmp_path)

    with pytest.raises(ConfigurationError, match="workers=0"):
        Launch(workers=0)
    with pytest.raises(ConfigurationError, match=r"launch\.workers=2 and no launch\.cluster; set .* local or slurm"):
        Launch(workers=2)
    with pytest.raises(ConfigurationError, match=r"found launch\.slurm and launch\.cluster=local; set"):
        Launch("local", slurm={"timeout_min": 9})
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(Launch("slurm"), r"found no srun .*cluster=local runs jobs here")
    (tmp_path / "srun").touch(mode=0o755)
    refused(Launch("slurm", 2, {"speed": 9}), r"cannot submit jobs with .*speed")
    for more in ([], ["--dry-run"]):
        options = ["--launch.cluster=slurm", "--launch.slurm={timeout_mni: 9}", *more]
        assert main(["run", "-c", str(config), f"--output={tmp_path}", *options]) == 2
        assert "cannot submit jobs with" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/expert*"))
    monkeypatch.setitem(sys.modules, "submitit", None)
    refused(LOCAL, r"pip install '\.\[slurm\]'")


@pytest.mark.slow
@pytest.mark.usefixtures("no_reports")
def test_experts_that_are_imported_need_no_process(finished: Path, config: Path, tmp_path: Path) -> None:
    experts = {task: str(finished / f"seed-0/experts/{task}/expert.safetensors") for task in ("digits", "letters")}
    given = [f"--expert.checkpoints={json.dumps(experts)}", "--methods=[{class_path: Average}]", "--only=digits"]
    base = f"--base={{task: null, checkpoint: {finished}/base/base.safetensors}}"
    launch = ["--launch.cluster=local", "--launch.workers=2"]
    assert main(["run", "-c", str(config), f"--output={tmp_path}", base, *given, *launch]) == 0
    assert not list((tmp_path / ".steps").glob("*/job"))
