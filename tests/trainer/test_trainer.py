"""What an evaluation leaves, and which Trainer is made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coin.data.tasks import Tasks
from coin.data.transform import to_input
from coin.errors import ConfigurationError
from coin.modules import Coded, DecodingEvaluator
from coin.reporting import read_results
from coin.trainer import Trainer, make_trainer as trainer_of_section

COLUMNS = ["method", "decoder", "task", "erased", "nda", "expert_accuracy", "code_row"]


@pytest.fixture
def evaluated(
    synthetic: Any, write_experts: Any, write_coded: Any, make_trainer: Callable[..., Trainer]
) -> tuple[DecodingEvaluator, Tasks, Any]:
    experts = write_experts([3, 2])
    coded = write_coded([[0.5, 0.5]], experts)
    members = {"task0": synthetic(3, key=0, test=23), "task1": synthetic(2, key=1, test=17)}
    model = DecodingEvaluator(experts, coded)
    tasks = Tasks(members, 21, seed=7)
    measured = make_trainer().evaluate(model, tasks, name="try", configuration={"x": [1]})
    return model, tasks, measured


def test_evaluate_writes_the_numbers_it_returns(evaluated: Any, tmp_path: Path) -> None:
    _, _, measured = evaluated
    frame = read_results(tmp_path / "run")
    assert len(frame) == 2 * (4 + 2 + 1)
    for (_, row), outcome in zip(frame.iterrows(), measured, strict=True):
        assert row[COLUMNS].to_dict() == {name: outcome.columns[name] for name in COLUMNS}
    assert set(frame["experiment"]) == {"try"}
    assert set(frame["seed"]) == {7}
    # The coded models were made of 20 samples a task; what is not made of samples has the evaluation's number.
    assert set(frame[frame["method"] == "average"]["samples_per_task"]) == {20}
    assert set(frame[frame["method"] == "none"]["samples_per_task"]) == {21}
    assert frame.groupby("task")["chance"].first().to_list() == [1 / 3, 1 / 2]
    described = json.loads((tmp_path / "run/results.json").read_text())["configuration"]
    assert (described["x"], described["tasks"]) == ([1], ["task0", "task1"])
    assert described["code"] == [[0.5, 0.5]]


def test_the_system_that_evaluate_writes_decodes(evaluated: Any, tmp_path: Path) -> None:
    model, tasks, _ = evaluated
    system = Coded.from_run(tmp_path / "run", decoder="linear")
    assert system.files == (*model.experts.paths.values(), *model.coded_files)
    images, _ = next(iter(tasks.tasks["task0"].test_dataloader()))
    inputs = to_input(images, 16)
    with torch.no_grad():
        expected = 2 * system.coded[0](inputs)
        expected[:, :2] -= system.experts[1](inputs)
        torch.testing.assert_close(system.decode(inputs, ["task0"])[0], expected)


def test_lightning_does_not_requeue_a_job_of_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NTASKS", "NTASKS_PER_NODE", "JOB_ID", "NNODES"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "coin")
    trainer: Any = trainer_of_section(tmp_path, {"accelerator": "cpu", "strategy": "ddp"})
    environment = trainer.strategy.cluster_environment
    assert type(environment).__name__ == "SLURMEnvironment"
    assert not environment.auto_requeue


SECTIONS = {
    "an unknown option": ({"speed": 3}, "the trainer section .*speed.* does not fit"),
    "weights in 16 bits": (
        {"precision": "bf16-true"},
        "found precision 'bf16-true'.*use bf16-mixed",
    ),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_a_section_that_does_not_fit_is_one_line(case: str, tmp_path: Path) -> None:
    options, message = SECTIONS[case]
    with pytest.raises(ConfigurationError, match=message):
        trainer_of_section(tmp_path, options)


def test_evaluate_takes_tasks_alone(
    synthetic: Any, make_trainer: Callable[..., Trainer], evaluated: Any
) -> None:
    model, _, _ = evaluated
    with pytest.raises(ConfigurationError, match="expected a DecodingEvaluator with Tasks"):
        make_trainer().evaluate(model, synthetic())
