"""Steps in processes, SLURM's jobs and Ray's tasks of their own, and what becomes of those that fail."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import coin.pipeline.run
from coin.cli import main
from coin.core.processes import cores
from coin.errors import CoinError, ConfigurationError
from coin.pipeline.plan import Planned
from coin.pipeline.pool import Command, CommandFailedError, Executor, Launch, open_pool, worker_environments
from coin.pipeline.run import run_steps
from coin.pipeline.step import DONE, Step, unkeyed

DEBUG = Launch(Executor.slurm, 2, {"cluster": "local", "timeout_min": 5})


@dataclass(frozen=True, eq=False, kw_only=True)
class Touch(Step):
    """A step that another process finishes."""

    parts: tuple["Touch", ...] = ()
    here: bool = unkeyed(default=False)
    doing: str = unkeyed(default="touching")

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
    return [Planned(step, step.name, experiment) for step in steps]


FINISH = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[-1])
time.sleep(0.2)
print("the last word of", folder.name, flush=True)
if "wrong" in folder.name:
    sys.exit(3)
folder.joinpath("done.json").write_text("{}")
"""


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have commands finish their step's folder, in place of ``coin run --only``."""
    start = subprocess.Popen

    def finish(command: list[str], **options: Any) -> Any:
        if command[1:3] == ["-m", "coin"]:
            command = [sys.executable, "-c", FINISH, str(Path(options["stdout"].name).parent)]
        return start(command, **options)

    monkeypatch.setattr("coin.pipeline.pool.subprocess.Popen", finish)


class InstantRay(SimpleNamespace):
    """Ray with one machine of two cores and one GPU, whose tasks run when they are asked for."""

    def __init__(self) -> None:
        super().__init__(exceptions=SimpleNamespace(RayError=CoinError), is_initialized=lambda: False)
        self.options: dict[str, Any] = {}
        self.calls: list[str] = []
        self.under_way = self.most = 0

    def init(self, address: str, **options: Any) -> None:
        self.options |= {"address": address, **options}

    def remote(self, **options: Any) -> Callable[[Callable[[Command], None]], Any]:
        self.options |= options
        threads = ThreadPoolExecutor(9)

        def start(run: Callable[[Command], None], command: Command) -> Any:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            future = threads.submit(run, command)
            future.add_done_callback(lambda _: setattr(self, "under_way", self.under_way - 1))
            return SimpleNamespace(future=lambda: future)

        return lambda run: SimpleNamespace(remote=partial(start, run))

    def cancel(self, _: Any, *, force: bool) -> None:
        self.calls.append(f"cancel {force}")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


@pytest.fixture
def instant_ray(monkeypatch: pytest.MonkeyPatch) -> InstantRay:
    ray = InstantRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


RAY = Launch(Executor.ray, 2, ray={"num_gpus": 0.5, "address": "auto"})


@pytest.mark.usefixtures("instant_ray", "processes")
@pytest.mark.parametrize("launch", [Launch(workers=2), RAY], ids=["local", "ray"])
def test_a_failed_step_stops_only_those_that_need_it(
    launch: Launch, planned: list[Planned], capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    with pytest.raises(CommandFailedError, match=r"1 of 6 steps failed, the first of them wrong: .*the last word of"):
        run_steps(planned, launch, lambda each, _: done.append(each.step.name))
    assert done[0] == "first"
    assert set(done) == {"first", "a", "c", "two"}
    told = capsys.readouterr().err.splitlines()
    assert "[2/6] a: touching, elsewhere" in told
    assert "[2/6] a: done" in told
    assert sum("failed" in line for line in told) == 1


def test_an_error_in_this_process_ends_the_run(planned: list[Planned]) -> None:
    done: list[str] = []
    with pytest.raises(CoinError, match=r"^it is wrong; fix it$"):
        run_steps(planned, on_done=lambda each, _: done.append(each.step.name))
    assert done == ["first", "a"]


@pytest.mark.usefixtures("processes")
def test_what_another_command_is_at_work_on_takes_no_worker(planned: list[Planned], tmp_path: Path) -> None:
    """A job for it would hold its allocation, and wait."""
    (busy,) = (each.step for each in planned if each.step.name == "a")
    started: list[str] = []

    def note(each: Planned, _: bool) -> None:
        started.append(each.step.name)
        if each.step.name == "c":
            busy.folder.mkdir(parents=True)
            busy.finish(1.0)  # by the other

    wanted = [each for each in planned if each.step.name in ("first", "a", "c", "two")]
    with busy.locked():
        run_steps(wanted, Launch(workers=2), note)
    assert started == ["first", "c", "a", "two"]
    assert not (busy.folder / "launch.log").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("no_reports")
def test_an_experiment_by_jobs_of_submitit_is_that_of_one_process(
    finished: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = ["--launch.executor=slurm", "--launch.workers=2", "--launch.slurm={cluster: local, timeout_min: 9}"]
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


def test_tasks_of_ray_are_as_many_at_a_time_as_workers(
    instant_ray: InstantRay, processes: None, planned: list[Planned], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CommandFailedError):
        run_steps(planned, RAY)
    assert instant_ray.most == 2
    told = {"num_cpus": max(1, cores() // 2), "num_gpus": 0.5, "name": "coin", "address": "auto"}
    assert instant_ray.options.items() >= told.items()
    assert instant_ray.calls[-1] == "shutdown"
    monkeypatch.setattr("coin.pipeline.run.time.sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    for each in planned:
        (each.step.folder / DONE).unlink(missing_ok=True)
    with pytest.raises(KeyboardInterrupt):
        run_steps(planned, RAY)
    assert instant_ray.calls[-3:] == ["cancel True", "cancel True", "shutdown"]


def test_ray_itself_runs_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("ray") is None:  # not imported before its variables are set
        pytest.skip("no Ray")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:1")  # of another cluster, which is not asked for
    commands = [Command([name], tmp_path / f"{name}.log") for name in ("--help", "nonsense")]
    with open_pool(Launch(Executor.ray, 2), tmp_path) as submit:
        assert submit is not None
        asked = [submit(command) for command in commands]
        while not all(has_ended() for has_ended in asked):
            time.sleep(0.1)
    assert "usage: coin" in commands[0].log.read_text()
    assert commands[0].failure().startswith("exit status 0: ")
    assert "exit status 2: coin: error: found command 'nonsense'" in commands[1].failure()


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
    with pytest.raises(ConfigurationError, match=r"launch\.slurm"):
        Launch(slurm={"timeout_min": 3})
    with pytest.raises(ConfigurationError, match=r"launch\.ray and launch\.executor slurm; set .*executor=ray"):
        Launch(Executor.slurm, ray={"num_gpus": 1})
    refused(Launch(Executor.slurm, 2, {"cluster": "debug", "speed": 9}), r"cannot use jobs with .*speed")
    for more in ([], ["--dry-run"]):
        options = ["--launch.executor=slurm", "--launch.slurm={cluster: debug, timeout_mni: 9}", *more]
        assert main(["run", "-c", str(config), f"--output={tmp_path}", *options]) == 2
        assert "cannot use jobs with" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/expert*"))
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(Launch(Executor.slurm), r"found no srun .*cluster=debug tries")
    monkeypatch.setitem(sys.modules, "submitit", None)
    refused(DEBUG, r"pip install '\.\[slurm\]'")
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(RAY, r"pip install '\.\[serve\]'")


@pytest.mark.slow
@pytest.mark.usefixtures("no_reports")
def test_experts_that_are_imported_need_no_process(finished: Path, config: Path, tmp_path: Path) -> None:
    experts = {task: str(finished / f"seed-0/experts/{task}/expert.safetensors") for task in ("digits", "letters")}
    given = [f"--expert.checkpoints={json.dumps(experts)}", "--methods=[{class_path: Average}]", "--only=digits"]
    base = f"--base={{task: null, checkpoint: {finished}/base/base.safetensors}}"
    assert main(["run", "-c", str(config), f"--output={tmp_path}", base, *given, "--launch.workers=2"]) == 0
    assert not list((tmp_path / ".steps").rglob("launch.log"))
