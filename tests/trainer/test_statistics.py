import pytest
import torch

from coin.data.tasks import Tasks
from coin.errors import ConfigurationError
from coin.files.tensors import fingerprint
from coin.networks import build_network
from coin.statistics import FisherKind, FisherOptions, fisher_sums
from coin.statistics.files import open_statistic
from coin.trainer import estimate_over_tasks


@pytest.fixture
def tasks(synthetic):
    tasks = Tasks({"a": synthetic(key=1), "b": synthetic(key=2)}, samples_per_task=10, batch_size=8, seed=3)
    tasks.setup()
    return tasks


@pytest.mark.parametrize(("kind", "mc_samples"), [("exact", None), ("categorical", None), ("monte_carlo", 2)])
def test_the_pass_under_a_trainer_equals_the_function(tasks, small_config, make_trainer, kind, mc_samples, tmp_path):
    network = build_network(small_config, 3).double()
    calibration = tasks.calibration()
    wanted = fisher_sums(
        network,
        calibration,
        kind=FisherKind(kind),
        mc_samples=mc_samples,
        generator=torch.Generator().manual_seed(3 * 100_003) if kind == "monte_carlo" else None,
    )
    options = FisherOptions(kind=kind, mc_samples=mc_samples)
    path = tmp_path / "a.fisher.safetensors"
    for _ in range(2):  # a second run starts from nothing
        costs = estimate_over_tasks(make_trainer(), network, tasks, options, path)
        found = open_statistic(path, statistic="fisher", weights=fingerprint(network.state_dict()))
        made = found.provenance
        assert (made["samples"], made["passes"], costs["passes"]) == (20, wanted.passes, wanted.passes)
        for name, value in wanted.mean().items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0.0)
    assert costs["seconds"] == made["seconds"] > 0
    assert all(p.grad is None for p in network.parameters())


def test_fewer_samples_than_processes_are_refused_in_one_line(tasks, small_config, make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer()
    monkeypatch.setattr(type(trainer), "world_size", 21)
    with pytest.raises(ConfigurationError, match=r"found 20 calibration samples for 21 processes.*take fewer devices"):
        estimate_over_tasks(trainer, build_network(small_config, 3), tasks, None, tmp_path / "a.safetensors")
