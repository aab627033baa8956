"""Experts side by side: the same experts as one after the other, each worker on a place of its own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import coin.pipeline.run
from coin.cli import main
from coin.core.processes import cores
from coin.errors import CoinError, CoinWarning, ConfigurationError
from coin.files.safetensors import load_state
from coin.pipeline.command import Command, step_command
from coin.pipeline.executors import raise_for, run_commands, worker_environments
from coin.pipeline.launch import Executor, Launch
from coin.pipeline.step import Step

pytestmark = pytest.mark.slow

DEBUG = Launch(Executor.slurm, 2, {"cluster": "debug"})


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Command]:
    """Three experts whose training is a shell script that notes its arguments; the second one fails."""
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/done\necho "threads $OMP_NUM_THREADS"\necho "the last word of $7"\n'
        'test "$7" != expert-b\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    steps = [Step(f"expert-{x}", tmp_path, f"expert {x}", "fine-tuning", print, training=tmp_path / x) for x in "abc"]
    return [step_command(step) for step in steps]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.02)


def send(number: signal.Signals, *processes: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # it has ended: the others must be told all the same
            os.kill(process, number)


def test_experts_side_by_side_are_those_of_one_after_the_other_and_none_is_trained_by_two(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is killed, and started again while its children, which live on, still train."""
    monkeypatch.setattr(coin.pipeline.run, "write_report", lambda *_: None)  # its plots take long
    shutil.copytree(finished / "base", tmp_path / "tiny/base")
    folders = [tmp_path / f"tiny/seed-0/experts/{task}" for task in ("digits", "letters")]
    logs = [folder / "launch.log" for folder in folders]
    command = ["run", "-c", str(config), f"--output={tmp_path}", "--methods=[{class_path: Average}]"]
    command += ["--launch.workers=2", "--decoders=[linear]"]
    parent = subprocess.Popen([sys.executable, "-m", "coin", *command], stderr=subprocess.DEVNULL)
    wait_for(lambda: all((folder / "checkpoints/step-key").exists() for folder in folders))
    orphans = [int((folder / ".lock").read_text().split()[1]) for folder in folders]
    send(signal.SIGSTOP, *orphans, parent.pid)
    steps = tmp_path / "tiny/seed-0/.steps"
    waiting = [log for log in logs if not (steps / f"expert-{log.parent.name}.json").exists()]  # one may have ended
    parent.kill()
    parent.wait()

    def let_go() -> None:
        try:
            wait_for(lambda: all("waiting for another coin command at work" in log.read_text() for log in waiting))
        finally:
            send(signal.SIGCONT, *orphans)

    watch = threading.Thread(target=let_go)
    watch.start()
    assert main(command) == 0
    watch.join()
    for folder, log in zip(folders, logs, strict=True):
        found, _ = load_state(folder / "expert.safetensors")
        wanted, _ = load_state(finished / f"seed-0/experts/{folder.name}/expert.safetensors")
        assert all(found[name].equal(wanted[name]) for name in wanted)
        assert log.read_text().count(f"seed 0: expert {folder.name}: fine-tuning") == 1
        assert log.read_text().count("fine-tuning") == 1, "a child trains its own expert alone"
        assert log.read_text().count(f"seed 0: expert {folder.name}: up to date") == (log in waiting)
    assert (tmp_path / "tiny/summary.csv").is_file()


@pytest.mark.parametrize("work", ["exec sleep 60", "trap '' TERM\nwhile :; do sleep 0.05; done"], ids=["ends", "stays"])
def test_the_end_of_the_command_is_the_end_of_its_children(
    work: str, jobs: list[Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with SIGTERM, which a scheduler sends before the end of an allocation."""
    monkeypatch.setattr("coin.pipeline.executors._STOP_SECONDS", 0.5)
    Path(sys.executable).write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/started\n{work}\n")

    def told(text: str) -> None:
        if text == "expert b: started":
            wait_for(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text().count("\n") == 2)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("coin.pipeline.executors.rank_zero_info", told)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        run_commands(jobs, Launch(workers=2), tmp_path / "submitit")
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    for number in (tmp_path / "started").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(number), 0)


class InstantRay(ModuleType):
    """Ray's functions that are called, each task run at once; `most` is how many were under way at a time."""

    exceptions = SimpleNamespace(RayError=CoinError)

    def __init__(self) -> None:
        super().__init__("ray")
        self.under_way, self.most, self.options, self.calls = 0, 0, {}, list[str]()

    def is_initialized(self) -> bool:
        return False

    def init(self, address: str, **options: Any) -> None:
        self.options |= {"address": address, **options}

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2, "GPU": 1}

    def remote(self, **options: Any) -> Callable[[Callable[[Command], None]], Any]:
        self.options |= options

        def start(run: Callable[[Command], None], command: Command) -> Callable[[], None]:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            return partial(run, command)

        return lambda run: SimpleNamespace(remote=partial(start, run))

    def wait(self, tasks: list[Any]) -> tuple[list[Any], list[Any]]:
        return tasks[:1], tasks[1:]

    def get(self, task: Callable[[], None]) -> None:
        self.under_way -= 1
        task()

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


def test_tasks_of_ray_are_as_many_at_a_time_as_workers(
    instant_ray: InstantRay, jobs: list[Command], tmp_path: Path
) -> None:
    run_commands(jobs, RAY, tmp_path)
    assert instant_ray.most == 2
    told = {"num_cpus": max(1, cores() // 2), "num_gpus": 0.5, "name": "coin", "address": "auto"}
    assert instant_ray.options.items() >= told.items()
    assert instant_ray.calls == ["shutdown"]
    instant_ray.wait = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run_commands(jobs, RAY, tmp_path)
    assert instant_ray.calls[1:] == ["cancel True", "cancel True", "shutdown"]


def test_what_no_machine_of_ray_has_is_said(instant_ray: InstantRay, jobs: list[Command], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"found launch.ray with {'GPU': 3}, expected no more than {'GPU': 1}"):
        run_commands(jobs, Launch(Executor.ray, ray={"num_gpus": 3}), tmp_path)
    with pytest.warns(CoinWarning, match="tasks wait until a machine joins"):
        run_commands(jobs, Launch(Executor.ray, ray={"resources": {"coin": 1}, "address": "auto"}), tmp_path)
    assert instant_ray.calls == ["shutdown", "shutdown"]
    assert instant_ray.options["address"] == "auto"


def test_ray_itself_runs_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray.remote_function")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:1")  # of another cluster, which is not asked for
    commands = [Command(name, [name], tmp_path / f"{name}.log") for name in ("--help", "nonsense")]
    assert run_commands(commands, Launch(Executor.ray, 2), tmp_path) == commands[1:]
    assert "usage: coin" in commands[0].log.read_text()
    assert "nonsense: failed: coin: error: found command 'nonsense'" in capsys.readouterr().err


@pytest.mark.usefixtures("instant_ray")
@pytest.mark.parametrize("launch", [Launch(workers=2), DEBUG, RAY], ids=["local", "slurm", "ray"])
def test_a_failed_expert_stops_none_of_the_others(
    launch: Launch, jobs: list[Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        CoinError, match=r"1 of 3 steps failed, the first of them expert b: the last word of expert-b .*b/launch.log"
    ):
        raise_for(run_commands(jobs, launch, tmp_path / "submitit"), 3, "steps")
    commands = (tmp_path / "done").read_text().splitlines()
    assert sorted(commands) == [f"-m coin run -c {tmp_path}/launch.yaml --only expert-{task}" for task in "abc"]
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "failed" in line] == [
        next(line for line in told if line.startswith("expert b: f"))
    ]
    assert sum("finished" in line for line in told) == 2


def test_every_worker_has_a_gpu_or_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("coin.pipeline.executors.cores", lambda: 7)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [place["OMP_NUM_THREADS"] for place in worker_environments(3)] == ["2", "2", "2"]
    assert "CUDA_VISIBLE_DEVICES" not in worker_environments(3)[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in worker_environments(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in worker_environments(2)] == ["5", "7"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in worker_environments(1)] == ["5,7"]


def test_a_job_queues_itself_again(jobs: list[Command]) -> None:
    assert jobs[0].checkpoint().function is jobs[0]


def test_what_does_not_fit_is_one_line(
    jobs: list[Command],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ConfigurationError, match="workers 0"):
        Launch(workers=0)
    with pytest.raises(ConfigurationError, match=r"launch\.slurm"):
        Launch(slurm={"timeout_min": 3})
    with pytest.raises(ConfigurationError, match=r"launch\.ray and launch\.executor slurm; set .*executor=ray"):
        Launch(Executor.slurm, ray={"num_gpus": 1})
    wrong = Launch(Executor.slurm, 2, {"cluster": "debug", "speed": 9})
    with pytest.raises(ConfigurationError, match=r"cannot submit jobs with .*speed"):
        run_commands(jobs, wrong, tmp_path / "submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"found no srun .*cluster=debug tries"):
        run_commands(jobs, Launch(Executor.slurm), tmp_path / "submitit")
    assert main(["run", "-c", str(config), "--only=nothing", "--name=mistake"]) == 2
    assert "found no task or step 'nothing', expected one of digits, letters" in capsys.readouterr().err
    assert not Path("runs/mistake").exists()
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigurationError, match=r"pip install '\.\[slurm\]'"):
        run_commands(jobs, DEBUG, tmp_path / "submitit")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"pip install '\.\[serve\]'"):
        run_commands(jobs, RAY, tmp_path)


@pytest.mark.usefixtures("no_reports")
def test_experts_that_are_imported_need_no_process(finished: Path, config: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").touch()  # a point of a sweep, which looks for its steps in others
    experts = {task: str(finished / f"seed-0/experts/{task}/expert.safetensors") for task in ("digits", "letters")}
    given = [f"--expert.checkpoints={json.dumps(experts)}", "--methods=[{class_path: Average}]", "--launch.workers=2"]
    base = f"--base={{task: null, checkpoint: {finished}/base/base.safetensors}}"
    assert main(["run", "-c", str(config), f"--output={tmp_path}", base, *given]) == 0
    assert not list((tmp_path / "tiny").rglob("launch.log"))


def test_a_seeds_configuration_does_not_launch_again(finished: Path) -> None:
    text = (finished / "seed-0/config.yaml").read_text()
    assert "launch" not in text
    assert "only:" not in text


def test_a_dry_run_says_what_each_job_gets_and_a_misspelt_option_is_told_before_anything_runs(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "-c", str(config), f"--output={tmp_path / 'runs'}", "--launch.executor=slurm"]
    jobs = "--launch.slurm={cluster: debug, timeout_min: 9}"
    assert main([*command, jobs, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "elsewhere: each in a SLURM job of its own, 1 at a time, each with cluster=debug, timeout_min=9" in told
    states = {line.split()[2]: " ".join(line.split()[3:6]) for line in told.splitlines() if " seed 0: " in line}
    assert states["expert-digits"] == "to do elsewhere"
    assert states["evaluate"] == "to do after"
    for more in ([], ["--dry-run"]):
        assert main([*command, jobs.replace("_min", "_mni"), *more]) == 2
        assert "cannot submit jobs with" in capsys.readouterr().err
    assert not (tmp_path / "runs/tiny/base").exists()


def test_a_folder_that_lacks_a_class_is_told_before_the_base_is_trained(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("train/a", "train/b", "test/a"):
        (tmp_path / "images" / place).mkdir(parents=True)
        shutil.copy(Path(__file__).parents[2] / "notebooks/results/stand-ins.png", tmp_path / "images" / place)
    task = f"--tasks.digits={{class_path: ImageFolder, init_args: {{root: {tmp_path / 'images'}}}}}"
    for more in ([], ["--dry-run"]):
        assert main(["run", "-c", str(config), f"--output={tmp_path / 'runs'}", task, *more]) == 2
        assert "test lacks the class 'b', unlike" in capsys.readouterr().err
    shutil.copytree(tmp_path / "images/test/a", tmp_path / "images/test/b")
    for more in ([], ["--dry-run"]):
        assert main(["run", "-c", str(config), f"--output={tmp_path / 'runs'}", task, *more]) == 2
        assert "calibration samples asked of the task 'digits' (ImageFolder)" in capsys.readouterr().err
    assert not (tmp_path / "runs/tiny/base").exists()
