"""The statistics that a Trainer computes: the pass of the function, over tasks, of checkpoints."""

from pathlib import Path

import pytest
import torch

from coin.data.tasks import Tasks
from coin.errors import CoinError
from coin.files.tensors import fingerprint
from coin.modules import Expert
from coin.networks import load_network
from coin.statistics import FisherKind, FisherOptions, fisher_sums
from coin.statistics.files import open_statistic

SMALL = {"network": "small_resnet", "image_size": 16, "options": {"width": 4}}


@pytest.fixture
def tasks(synthetic):
    members = {"a": synthetic(key=1), "b": synthetic(key=2)}
    tasks = Tasks(members, 10, batch_size=8, seed=3)
    tasks.setup()
    return tasks


CASES = [
    ("own", FisherKind.exact, None),
    ("pooled", FisherKind.exact, None),
    ("pooled", FisherKind.monte_carlo, 2),
]


@pytest.mark.parametrize(("samples", "kind", "draws"), CASES)
def test_fisher_is_that_of_the_function_over_a_task_or_over_several(
    samples, kind, draws, tasks, synthetic, make_trainer, tmp_path
):
    expert = Expert(**SMALL, num_classes=3, initial_seed=4).double()
    data = {"own": synthetic(seed=6), "pooled": tasks}[samples]
    members = {"task": data} if samples == "own" else tasks.tasks
    generator = torch.Generator().manual_seed(data.seed * 100_003)
    calibration = Tasks(members, 9).calibration()
    options = FisherOptions(kind, draws)
    expected = fisher_sums(expert.network, calibration, options, generator=generator)
    for _ in range(2):  # a second run starts from nothing
        make_trainer().fisher(expert, data, samples_per_task=9, kind=kind, mc_samples=draws)
        weights = fingerprint(expert.network.state_dict())
        path = tmp_path / "run/expert.fisher.safetensors"
        found = open_statistic(path, statistic="fisher", weights=weights)
        for name, value in expected.mean().items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0)
    made = found.provenance
    assert made["kind"] == kind
    assert made["data"] == samples
    assert made["seed"] == data.seed
    assert made["samples"] == 9 * len(members)
    assert made["passes"] == expected.passes
    assert all(parameter.grad is None for parameter in expert.network.parameters())


@pytest.fixture
def fisher(synthetic, make_trainer):
    """Return a function that computes a statistic of an untrained expert or of a checkpoint."""

    def compute(**options):
        usual = {"model": Expert(**SMALL, num_classes=3), "datamodule": synthetic()}
        make_trainer().fisher(**usual | options)

    return compute


def test_fisher_reads_both_kinds_of_checkpoint(
    fisher, write_experts, synthetic, make_trainer, tmp_path
):
    (path,) = write_experts([3]).values()
    state = load_network(Path(path)).network.state_dict()
    expert = Expert(**SMALL, num_classes=3)
    expert.network.load_state_dict(state)
    trainer = make_trainer(max_epochs=0)
    trainer.fit(expert, datamodule=synthetic())
    last = str(tmp_path / "last.ckpt")
    trainer.save_checkpoint(last)
    for checkpoint in (path, last):
        fisher(ckpt_path=checkpoint, samples_per_task=10, statistic="gram")
        file = tmp_path / "run/expert.gram.safetensors"
        found = open_statistic(file, statistic="gram", weights=fingerprint(state))
        assert found.provenance["samples"] == 10
        file.unlink()


MISTAKES = {
    "found no file 'none.ckpt'": {"ckpt_path": "none.ckpt"},
    "found no file 'none.safetensors'": {"ckpt_path": "none.safetensors"},
    "other.ckpt' has no tensor .*of another architecture": {"ckpt_path": "other.ckpt"},
    "99 calibration samples of .*, expected at most": {"samples_per_task": 99},
    "found statistic='grm'.*did you mean gram": {"statistic": "grm"},
    "found a model without a network": {"model": Expert(**SMALL)},
}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("message", MISTAKES)
def test_what_fisher_cannot_use_is_named(message, fisher):
    torch.save({"state_dict": {"network.fc.weight": torch.ones(1)}}, "other.ckpt")
    with pytest.raises(CoinError, match=message):
        fisher(**MISTAKES[message])
