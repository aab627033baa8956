"""Commands that are to log online and cannot, and W&B's failure at the very end."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from lightning.pytorch.loggers import WandbLogger

from coin.cli import main
from coin.data.tasks import Tasks
from coin.errors import CoinWarning
from coin.modules import DecodingEvaluator
from coin.reporting import read_results
from coin.tracking.settings import run_environment

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENT = {
    "name": "tiny",
    "network": {"name": "small_resnet", "image_size": 16, "options": {"width": 4}},
    "tasks": {"a": {"class_path": "Digits"}, "b": {"class_path": "Glyphs", "init_args": {"classes": "A-F"}}},
    "methods": [{"class_path": "Average"}],
}
SCRIPT = """
import faulthandler, json, os, sys
import wandb
from coin.cli import main

for case in json.load(sys.stdin):
    faulthandler.dump_traceback_later(60, exit=True)
    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        os.environ.pop(name, None)
    os.environ.update(case["environment"])
    print("status", main(case["arguments"]), file=sys.stderr, flush=True)
"""


def test_every_command_that_cannot_log_online_says_so_at_once(tmp_path: Path, write_experts: Callable[..., dict]):
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    experts = yaml.safe_dump(write_experts([10, 6]), default_flow_style=True, width=10_000).strip()
    tasks = "{task0: {class_path: Digits}, task1: {class_path: Glyphs, init_args: {classes: A-F}}}"
    fit = ["fit", "-c", str(CONFIGS / "expert/mnist5k.yaml")]
    evaluate = ["evaluate", "-c", str(CONFIGS / "evaluate/default.yaml"), f"--model.experts={experts}"]
    commands = [["run", "-c", "experiment.yaml"], [*evaluate, f"--data.tasks={tasks}"], fit]
    online, key = {"WANDB_MODE": "online"}, {"WANDB_API_KEY": "x" * 40}
    cases = [{"arguments": each, "environment": online | given} for given in ({}, key) for each in commands]
    with socket.socket() as taken:  # bound but not listening: the port refuses connections
        taken.bind(("127.0.0.1", 0))
        ours = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        environment = ours | {
            "NETRC": str(tmp_path / "no-netrc"),
            "WANDB_BASE_URL": f"http://127.0.0.1:{taken.getsockname()[1]}",
            "WANDB_HTTP_TIMEOUT": "1",
            "no_proxy": "*",
        }

        def run() -> str:
            # A file, for W&B's service process would hold a pipe open.
            script, stderr = [sys.executable, "-W", "ignore", "-c", SCRIPT], tmp_path / "stderr"
            with stderr.open("w") as file:
                kept: Any = {"stdout": subprocess.DEVNULL, "stderr": file, "cwd": tmp_path, "env": environment}
                subprocess.run(script, input=json.dumps(cases), text=True, **kept)
            return stderr.read_text(encoding="utf-8")

        stderr = run()
        if "Timeout (0:01:00)!" in stderr:  # W&B waits for its service process without a deadline: seen once
            stderr = run()
    said = stderr.strip().splitlines()
    assert len(said) == 2 * len(cases), stderr
    for number, (line, status) in enumerate(zip(said[::2], said[1::2], strict=True)):
        assert status == "status 2"
        assert line.startswith("coin: error: W&B is to work online, but ")
        advice = "check the network" if "WANDB_API_KEY" in cases[number]["environment"] else "run `wandb login`"
        assert advice in line
    assert not (tmp_path / "runs").exists()


def test_results_stand_where_w_and_b_fails_at_the_very_end(
    tmp_path: Path, synthetic: Any, write_experts: Any, write_coded: Any, make_trainer: Any, monkeypatch: Any
):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tasks = Tasks({"task0": synthetic(3, key=0, test=23), "task1": synthetic(2, key=1, test=17)}, 20, seed=7)
    experts = write_experts([3, 2])
    evaluator = DecodingEvaluator(experts, write_coded([[0.5, 0.5]], experts))

    def broken(*_: Any, **__: Any) -> None:
        raise BrokenPipeError("the service is gone")

    monkeypatch.setattr(wandb.Run, "log", broken)
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda *_, **__: None)
    with run_environment(tmp_path):
        run = wandb.init(project="p", dir=str(tmp_path))
        try:
            trainer = make_trainer(logger=WandbLogger(experiment=run))
            with pytest.warns(CoinWarning, match=r"W&B did not take the evaluation \(BrokenPipeError: the service is"):
                outcomes = trainer.evaluate(evaluator, tasks)
        finally:
            run.finish()
    frame = read_results(tmp_path / "run")
    assert len(frame) == len(outcomes) > 0
    assert (tmp_path / "run/results.json").is_file()


@pytest.mark.parametrize("name", ["csv", "wandb"])
def test_shipped_loggers_log_a_training_run(name: str, tmp_path: Path, monkeypatch: Any, read_wandb: Any):
    monkeypatch.chdir(tmp_path)
    for variable in ("WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    small = ["--model.options={width: 4}", "--model.image_size=16", "--data.image_size=16", "--trainer.callbacks=[]"]
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
    configs = ["-c", str(CONFIGS / "expert/mnist5k.yaml"), "-c", str(CONFIGS / f"logger/{name}.yaml")]
    assert main(["fit", *configs, *small, *short, *quiet]) == 0
    if wandb.run is not None:
        wandb.run.finish()
    (metrics,) = (tmp_path / "runs").rglob("metrics.csv")
    assert "val/accuracy" in metrics.read_text(encoding="utf-8").splitlines()[0]
    folders = list((tmp_path / "runs").rglob("offline-run-*"))
    assert len(folders) == (name == "wandb")
    for folder in folders:
        records = read_wandb(folder)
        axes = {r["metric"].get("name"): r["metric"].get("step_metric") for r in records if r["type"] == "metric"}
        assert axes["val/accuracy"] == "epoch"
        history = [record["history"]["item"] for record in records if record["type"] == "history"]
        assert any("val/accuracy" in row and row["epoch"] == 0 for row in history)
