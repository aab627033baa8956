"""Steps as jobs of their own, on this machine and of SLURM, and what becomes of those that fail."""

import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import coin.files.safetensors
from coin.cli import main
from coin.errors import CoinError, ConfigurationError
from coin.pipeline.plan import Planned
from coin.pipeline.pool import Cluster, Command, CommandFailedError, Launch, open_pool, worker_environments
from coin.pipeline.run import run_steps
from coin.pipeline.step import Step
from tests.pipeline.finishing import Finish

LOCAL = Launch(Cluster.local, 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Touch(Step):
    """A step that another process finishes."""

    parts: tuple["Touch", ...] = ()
    here: bool = False
    doing: str = "touching"

    @property
    def remote(self) -> bool:  # type: ignore[override]
        return not self.here

    def run(self) -> None:
        if "wrong" in self.name:
            raise CoinError("it is wrong; fix it")


@pytest.fixture
def planned(tmp_path: Path) -> list[Planned]:
    """A step here, then three elsewhere, the second of which fails, then one that needs all and one that needs two."""
    make = partial(Touch, store=tmp_path / ".steps")
    first = make(name="first", here=True)
    a, wrong, c = (make(name=name, parts=(first,)) for name in ("a", "wrong", "c"))
    steps = [first, a, wrong, c, make(name="all", parts=(a, wrong, c)), make(name="two", parts=(a, c), here=True)]
    experiment: Any = SimpleNamespace(name="x", as_yaml=lambda: "{}")
    return [Planned(step, step.name, experiment, tmp_path / step.name) for step in steps]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have jobs finish their step's folder alone."""
    monkeypatch.setattr("coin.pipeline.run.Command", Finish)
    monkeypatch.setenv("JOB_SECONDS", "0.2")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.mark.usefixtures("jobs")
def test_a_failed_step_stops_only_those_that_need_it(
    planned: list[Planned], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("coin.pipeline.pool.cores", lambda: 6)
    done: list[str] = []
    monkeypatch.setattr(Planned, "publish", lambda each: done.append(each.step.name))
    with pytest.raises(CommandFailedError, match=r"1 of 6 steps failed, the first of them wrong: .*the last word of"):
        run_steps(planned, LOCAL)
    assert done[0] == "first"
    assert set(done) == {"first", "a", "c", "two"}
    told = capsys.readouterr().err.splitlines()
    assert "[2/6] a: touching, elsewhere" in told
    assert "[2/6] a: done" in told
    assert sum("failed" in line for line in told) == 1
    (made,) = planned[1].step.store.glob("a-*/threads")
    assert made.read_text() == "3"  # the share of one worker of two


def test_an_error_in_this_process_ends_the_run(planned: list[Planned], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(Planned, "publish", lambda each: done.append(each.step.name))
    with pytest.raises(CoinError, match=r"^it is wrong; fix it$"):
        run_steps(planned)
    assert done == ["first", "a"]


@pytest.mark.usefixtures("jobs")
def test_what_another_command_is_at_work_on_takes_no_worker(
    planned: list[Planned], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job for it would hold its allocation, and wait."""
    (busy,) = (each.step for each in planned if each.step.name == "a")
    started: list[str] = []

    def note(each: Planned) -> None:
        started.append(each.step.name)
        if each.step.name == "c":
            busy.folder.mkdir(parents=True)
            busy.finish(1.0)  # by the other

    wanted = [each for each in planned if each.step.name in ("first", "a", "c", "two")]
    monkeypatch.setattr(Planned, "publish", note)
    with busy.locked():
        run_steps(wanted, LOCAL)
    assert started == ["first", "c", "a", "two"]
    assert not (busy.folder / "launch.log").exists()


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
    logs = list((tmp_path / ".steps").glob("*/launch.log"))
    assert {log.parent.name.rpartition("-")[0] for log in logs} >= {"expert-digits", "fisher-letters", "evaluate"}
    capsys.readouterr()
    assert main(command) == 0
    assert "elsewhere" not in capsys.readouterr().err


def is_alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return "Z" not in Path(f"/proc/{process}/stat").read_text()
    return False


@pytest.mark.usefixtures("jobs")
def test_jobs_of_this_machine_are_as_many_as_workers_and_end_with_the_command(
    planned: list[Planned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_SECONDS", "600")
    waited = []

    def wait(_: float) -> None:
        waited.append(list(tmp_path.glob(".steps/*/process")))
        if len(waited[-1]) == 2:
            raise KeyboardInterrupt
        threading.Event().wait(0.2)

    monkeypatch.setattr("coin.pipeline.run.time.sleep", wait)
    with pytest.raises(KeyboardInterrupt):
        run_steps(planned, LOCAL)
    processes = [int(path.read_text()) for path in tmp_path.glob(".steps/*/process")]
    assert len(processes) == 2
    deadline = time.monotonic() + 30
    while any(map(is_alive, processes)):
        assert time.monotonic() < deadline
        threading.Event().wait(0.2)


def test_a_command_that_did_not_come_to_its_end_has_no_last_word(tmp_path: Path) -> None:
    command = Command([], tmp_path / "a.log")
    assert command.failure() == "it ended without a result, cancelled or killed"
    command.log.write_text("answers queries\n")
    command.job.write_text("17")
    assert command.failure() == f"job 17 ended without a result, cancelled or killed (see {command.log})"
    with pytest.raises(CommandFailedError, match="exit status 2: coin: error: found command 'nonsense'"):
        Command(["nonsense"], command.log)()


def test_every_worker_has_a_gpu_or_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("coin.pipeline.pool.cores", lambda: 7)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [place["OMP_NUM_THREADS"] for place in worker_environments(3)] == ["2", "2", "2"]
    assert "CUDA_VISIBLE_DEVICES" not in worker_environments(3)[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in worker_environments(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in worker_environments(2)] == ["5", "7"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in worker_environments(1)] == ["5,7"]


def test_what_does_not_fit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(launch: Launch, match: str) -> None:
        with pytest.raises(ConfigurationError, match=match), open_pool(launch, tmp_path):
            pass

    with pytest.raises(ConfigurationError, match="workers=0"):
        Launch(workers=0)
    with pytest.raises(ConfigurationError, match=r"launch\.workers=2 and no launch\.cluster; set .* local or slurm"):
        Launch(workers=2)
    with pytest.raises(ConfigurationError, match=r"launch\.slurm and launch\.cluster=local; set .*cluster=slurm"):
        Launch(Cluster.local, slurm={"timeout_min": 3})
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(Launch(Cluster.slurm), r"found no srun .*cluster=local runs jobs here")
    (tmp_path / "srun").touch(mode=0o755)
    refused(Launch(Cluster.slurm, 2, {"speed": 9}), r"cannot use jobs with .*speed")
    for more in ([], ["--dry-run"]):
        options = ["--launch.cluster=slurm", "--launch.slurm={timeout_mni: 9}", *more]
        assert main(["run", "-c", str(config), f"--output={tmp_path}", *options]) == 2
        assert "cannot use jobs with" in capsys.readouterr().err
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
    assert not list((tmp_path / ".steps").rglob("launch.log"))
