"""What an evaluation leaves, and which Trainer is made."""

import json

import pytest
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from coin.data.tasks import Tasks
from coin.errors import ConfigurationError
from coin.modules import Coded, DecodingEvaluator
from coin.reporting import read_results
from coin.trainer import make_trainer as trainer_of_section

COLUMNS = ["method", "decoder", "task", "erased", "nda", "expert_accuracy", "code_row"]


@pytest.fixture
def model(write_experts, write_coded):
    experts = write_experts([3, 2])
    return DecodingEvaluator(experts, write_coded([[0.5, 0.5]], experts))


@pytest.fixture
def tasks(synthetic):
    members = {"task0": synthetic(3, key=0, test=23), "task1": synthetic(2, key=1, test=17)}
    return Tasks(members, 21, seed=7)


def test_evaluate_writes_the_numbers_it_returns(model, tasks, make_trainer, tmp_path):
    measured = make_trainer().evaluate(model, tasks, name="try", configuration={"x": [1]})
    frame = read_results(tmp_path / "run")
    assert len(frame) == 2 * (4 + 2 + 1)
    for (_, row), outcome in zip(frame.iterrows(), measured, strict=True):
        expected = {name: outcome.columns[name] for name in COLUMNS}
        assert row[COLUMNS].to_dict() == expected
    assert set(frame["experiment"]) == {"try"}
    assert set(frame["seed"]) == {7}
    # The coded models were made of 20 samples a task; what is not made of samples has the evaluation's number.
    samples = frame.groupby("method")["samples_per_task"].unique()
    assert samples["average"] == 20
    assert samples["none"] == 21
    assert frame.groupby("task")["chance"].first().to_list() == [1 / 3, 1 / 2]
    described = json.loads((tmp_path / "run/results.json").read_text())["configuration"]
    assert described["x"] == [1]
    assert described["tasks"] == ["task0", "task1"]
    assert described["code"] == [[0.5, 0.5]]
    system = Coded.from_run(tmp_path / "run", decoder="linear")
    assert system.files == (*model.experts.paths.values(), *model.coded_files)


def test_lightning_does_not_requeue_a_job_of_slurm(tmp_path, monkeypatch):
    for name in ("NTASKS", "NTASKS_PER_NODE", "JOB_ID", "NNODES"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "coin")
    trainer = trainer_of_section(tmp_path, {"accelerator": "cpu", "strategy": "ddp"})
    environment = trainer.strategy.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue


SECTIONS = {
    "the trainer section .*speed.* does not fit": {"speed": 3},
    "found precision 'bf16-true'.*use bf16-mixed": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("message", SECTIONS)
def test_a_section_that_does_not_fit_is_one_line(message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        trainer_of_section(tmp_path, SECTIONS[message])


def test_evaluate_takes_tasks_alone(model, synthetic, make_trainer):
    with pytest.raises(ConfigurationError, match="expected a DecodingEvaluator with Tasks"):
        make_trainer().evaluate(model, synthetic())
