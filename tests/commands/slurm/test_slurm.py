"""SLURM without a cluster: the template's job, its signal, its queueing again, its going on."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from coin.data import Digits

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
TEMPLATE = ROOT / "configs/cluster/run.sbatch"
JOB = "4242"
EPOCHS = 4
SIGNAL_AT = 7
WHOLE = 5
"""The steps of the epochs that are whole by then."""

# 81 training samples for two tasks of 8 a step: five steps an epoch, and one sample left out.
CONFIG = f"""
name: job
network: {{name: small_resnet, image_size: 16, options: {{width: 4}}}}
tasks:
  digits: {{class_path: Digits, init_args: {{max_train: 81, max_test: 37}}}}
  letters: {{class_path: Glyphs, init_args: {{classes: A-E, train_per_class: 17, test_per_class: 5}}}}
expert: {{epochs: {EPOCHS}, lr: 0.02, batch_size: 8}}
calibration: {{samples_per_task: 20}}
methods: [{{class_path: Average}}]
"""
FIT = f"""
model: {{class_path: Expert, init_args: {{network: small_resnet, image_size: 16, options: {{width: 4}}, lr: 0.02}}}}
data: {{class_path: Digits, init_args: {{max_train: 81, max_test: 37, image_size: 16, batch_size: 8}}}}
trainer: {{max_epochs: {EPOCHS}, logger: false, callbacks: [{{class_path: ExpertExport}}]}}
"""
TRAINER = "trainer: {accelerator: cpu, devices: 2, num_nodes: 1, strategy: ddp}"


def test_the_template_is_a_script_and_asks_for_what_the_trainer_uses():
    subprocess.run(["bash", "-n", TEMPLATE], check=True)
    trainer = yaml.safe_load((ROOT / "configs/cluster/slurm.yaml").read_text())["trainer"]
    asked = dict(re.findall(r"(?m)^#SBATCH --([\w-]+)=?(.*)$", TEMPLATE.read_text()))
    assert int(asked["nodes"]) == trainer["num_nodes"]
    assert int(asked["ntasks-per-node"]) == trainer["devices"]
    assert asked["gres"] == f"gpu:{trainer['devices']}"
    assert asked["signal"].startswith("B:USR1@")
    assert "requeue" in asked
    assert asked["open-mode"] == "append"


@pytest.fixture
def cluster(tmp_path):
    """The environment of a job on a machine whose srun and scontrol are the tests' own."""
    fakes = tmp_path / "bin"
    fakes.mkdir()
    srun = f'exec {sys.executable} -W ignore {Path(__file__).with_name("fake_srun.py")} "$@"'
    scontrol = f'echo "$@" >> {tmp_path}/scontrol.txt\nkill -9 $(cat {tmp_path}/tasks.txt)'
    for name, lines in (("srun", srun), ("scontrol", scontrol)):
        (fakes / name).write_text(f"#!/bin/sh\n{lines}\n")
        (fakes / name).chmod(0o755)
    (tmp_path / "job.yaml").write_text(CONFIG)
    (tmp_path / "fit.yaml").write_text(FIT)
    (tmp_path / "two.yaml").write_text(TRAINER)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    foreign = ("SLURM", "WANDB")
    own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return own | {
        "PATH": f"{fakes}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "FAKE_SLURM": str(tmp_path),
        "CLUSTER": str(tmp_path / "two.yaml"),
        "RUN": str(tmp_path / "runs"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NAME": "coin",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "OMP_WAIT_POLICY": "passive",
        "WANDB_MODE": "offline",
        "SIGNAL_AT": str(SIGNAL_AT),
    }


def submit(environment, *arguments):
    """Run the template's job."""
    job = ["bash", TEMPLATE, *arguments]
    return subprocess.run(
        job, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def steps(folder, task):
    return [json.loads(line) for line in (folder / f"steps-{task}.txt").read_text().splitlines()]


def expected_steps(task):
    """Return the steps of all epochs of one of two tasks."""
    data = Digits(max_train=81, max_test=37, batch_size=8)
    found = []
    for epoch in range(EPOCHS):
        data.trainer = SimpleNamespace(global_rank=task, world_size=2, current_epoch=epoch)
        for _, labels in data.train_dataloader():
            found.append([len(found), epoch, labels.tolist()])
    return found


@pytest.mark.parametrize(
    ("command", "options"), [("run", ["job.yaml", "--only=digits"]), ("fit", ["fit.yaml"])]
)
def test_a_signalled_job_goes_on_from_its_last_whole_epoch(command, options, cluster, tmp_path):
    file, *rest = options
    runs = tmp_path / "runs"
    job = [command, "-c", str(tmp_path / file), *rest]
    left = submit(cluster, *job)
    assert left.returncode != 0, left.stderr
    assert (tmp_path / "scontrol.txt").read_text().splitlines() == [f"requeue {JOB}"], left.stderr
    done = [steps(tmp_path, task) for task in (0, 1)]
    assert not list(runs.rglob("expert.safetensors"))
    assert [path.name for path in runs.rglob("*.ckpt")] == ["last.ckpt"]
    run_ids = [path.read_text() for path in runs.rglob("wandb-run-id")]

    again = submit(cluster, *job)
    assert again.returncode == 0, again.stderr
    for task in (0, 1):
        expected = expected_steps(task)
        assert done[task] == expected[: SIGNAL_AT + 1]
        assert steps(tmp_path, task) == done[task] + expected[WHOLE:]
    assert len(list(runs.rglob("expert.safetensors"))) == 1
    assert len((tmp_path / "scontrol.txt").read_text().splitlines()) == 1
    if command == "run":
        offline = [path.name for path in runs.rglob("offline-run-*") if path.is_dir()]
        assert [name.rpartition("-")[2] for name in offline] == run_ids * 2


def test_a_job_that_fails_says_so_and_is_not_queued_again(cluster, tmp_path):
    done = submit(cluster, "run", "-c", str(tmp_path / "job.yaml"), "--only=nothing")
    assert done.returncode == 2
    assert not (tmp_path / "scontrol.txt").exists()
