import csv
import json
from pathlib import Path

import pytest
import torch

from coin.data.tasks import Tasks
from coin.data.transform import to_input
from coin.errors import ConfigurationError, DataError, FileError, StateError
from coin.files.tensors import fingerprint
from coin.modules import Coded, DecodingEvaluator, Expert
from coin.networks import build_network, load_network
from coin.statistics import fisher_diagonal
from coin.statistics.files import open_statistic

pytestmark = pytest.mark.slow

SMALL = {"network": "small_resnet", "image_size": 16, "options": {"width": 4}}


def fisher_of(network, batches, **options):
    return fisher_diagonal(network.to(memory_format=torch.channels_last), batches, **options)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # In single precision an entry is as precise as the tensor's gradients are on the whole.
        torch.testing.assert_close(found[name], value, rtol=0.0, atol=1e-5 * float(value.max()))


def test_fisher_writes_the_diagonal_of_a_configured_expert(tmp_path, synthetic, make_trainer):
    expert = Expert(**SMALL, num_classes=3, initial_seed=4)
    make_trainer().fisher(expert, synthetic(seed=3), samples_per_task=11)
    mark = fingerprint(build_network(expert.config, 3, seed=4).state_dict())
    statistic = open_statistic(tmp_path / "run" / "expert.fisher.safetensors", statistic="fisher", weights=mark)
    assert_same(statistic, fisher_of(expert.network, synthetic(seed=3).calibration(11)))
    assert (statistic.provenance["samples"], statistic.provenance["passes"]) == (11, 11 * 7)
    made = statistic.provenance
    assert (made["kind"], made["data"], made["seed"]) == ("exact", "own", 3)


def test_fisher_over_several_tasks_is_pooled(tmp_path, synthetic, make_trainer):
    tasks = Tasks({"a": synthetic(key=1), "b": synthetic(key=2)}, samples_per_task=5, seed=6)
    expert = Expert(**SMALL, num_classes=3)
    make_trainer().fisher(expert, tasks, samples_per_task=9)
    statistic = open_statistic(tmp_path / "run" / "expert.fisher.safetensors", statistic="fisher")
    wanted = fisher_of(expert.network, Tasks(tasks.tasks, samples_per_task=9, seed=6).calibration())
    assert_same(statistic, wanted)
    assert statistic.provenance["samples"] == 18
    assert (statistic.provenance["data"], statistic.provenance["seed"]) == ("pooled", 6)


def test_fisher_reads_both_kinds_of_checkpoint(tmp_path, synthetic, make_trainer, write_experts):
    path = Path(write_experts([3])["task0"])
    network = load_network(path).network
    expert = Expert(**SMALL, num_classes=3)
    expert.network.load_state_dict(network.state_dict())
    trainer = make_trainer(max_epochs=0)
    trainer.fit(expert, datamodule=synthetic())
    (tmp_path / "checkpoint").mkdir()
    trainer.save_checkpoint(tmp_path / "checkpoint" / "last.ckpt")
    calibration, kind = synthetic().calibration(10), "categorical"
    wanted = fisher_of(network, calibration, kind=kind)
    for checkpoint in (path, tmp_path / "checkpoint" / "last.ckpt"):
        trainer = make_trainer(default_root_dir=tmp_path / kind)
        trainer.fisher(Expert(**SMALL, num_classes=3), synthetic(), str(checkpoint), samples_per_task=10, kind=kind)
        statistic = open_statistic(
            tmp_path / kind / "expert.fisher.safetensors",
            statistic="fisher",
            weights=fingerprint(network.state_dict()),
        )
        assert_same(statistic, wanted)
        assert statistic.provenance["kind"] == kind


def test_what_fisher_cannot_use_is_named(tmp_path, synthetic, make_trainer):
    expert = Expert(**SMALL, num_classes=3)
    with pytest.raises(FileError, match=r"found no file '.*none\.ckpt'"):
        make_trainer().fisher(expert, synthetic(), str(tmp_path / "none.ckpt"))
    with pytest.raises(FileError, match="found no file"):
        make_trainer().fisher(expert, synthetic(), str(tmp_path / "none.safetensors"))
    with pytest.raises(DataError, match=r"99 calibration samples of .*, expected at most"):
        make_trainer().fisher(expert, synthetic(), samples_per_task=99)
    with pytest.raises(ConfigurationError, match="found statistic 'grm'"):
        make_trainer().fisher(expert, synthetic(), statistic="grm")
    with pytest.raises(ConfigurationError, match="found a model without a network"):
        make_trainer().fisher(Expert(**SMALL), synthetic())
    torch.save({"state_dict": {"network.fc.weight": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(StateError, match=r"other\.ckpt' has no tensor 'fc\.bias'.*of another architecture"):
        make_trainer().fisher(expert, synthetic(), str(tmp_path / "other.ckpt"))


@pytest.fixture
def pair(synthetic, write_experts, write_coded):
    experts = write_experts([3, 2])
    tasks = {"task0": synthetic(3, key=0, test=23), "task1": synthetic(2, key=1, test=17)}
    return DecodingEvaluator(experts, write_coded([[0.5, 0.5]], experts)), Tasks(tasks, 20, seed=7)


def test_evaluate_writes_the_numbers_it_returns(tmp_path, pair, make_trainer):
    trainer = make_trainer(default_root_dir=tmp_path / "results")
    outcomes = trainer.evaluate(*pair, name="try", configuration={"x": [1]})
    with (tmp_path / "results" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(outcomes) == 2 * (4 + 2 + 1)
    for row, outcome in zip(rows, outcomes, strict=True):
        assert (row["experiment"], row["seed"], row["samples_per_task"]) == ("try", "7", "20")
        told = ("method", "decoder", "task")
        assert [row[name] for name in told] == [outcome.columns[name] for name in told]
        assert row["erased"] == row["task"]
        assert float(row["nda"]) == outcome.columns["nda"]
        assert float(row["expert_accuracy"]) == outcome.columns["expert_accuracy"]
        assert row["code_row"] == outcome.columns["code_row"]
    described = json.loads((tmp_path / "results" / "results.json").read_text())["configuration"]
    assert described["x"] == [1]
    assert described["tasks"] == ["task0", "task1"]
    assert described["code"] == [[0.5, 0.5]]
    system = Coded.from_run(tmp_path / "results", decoder="linear")
    evaluator, tasks = pair
    assert system.files == (*evaluator.experts.paths.values(), *evaluator.coded_files)
    inputs = to_input(next(iter(tasks.tasks["task0"].test_dataloader()))[0], 16)
    with torch.no_grad():
        expected = 2 * system.coded[0](inputs)
        expected[:, :2] -= system.experts[1](inputs)
        torch.testing.assert_close(system.decode(inputs, ["task0"])[0], expected)
