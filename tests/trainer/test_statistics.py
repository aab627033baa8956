"""The statistics that a Trainer computes: the pass of the function, over tasks, of checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coin.data.tasks import Tasks
from coin.errors import CoinError, ConfigurationError
from coin.files.tensors import fingerprint
from coin.modules import Expert
from coin.networks import NetworkConfig, build_network, load_network
from coin.statistics import FisherOptions, fisher_sums
from coin.statistics.files import open_statistic
from coin.trainer import Trainer, estimate_over_tasks

SMALL = {"network": "small_resnet", "image_size": 16, "options": {"width": 4}}


@pytest.fixture
def tasks(synthetic: Any) -> Tasks:
    return Tasks({"a": synthetic(key=1), "b": synthetic(key=2)}, 10, batch_size=8, seed=3)


@pytest.fixture
def calibration(tasks: Tasks) -> Any:
    tasks.setup()
    return tasks.calibration()


@pytest.mark.parametrize("kind", ["exact", "categorical", "monte_carlo"])
def test_the_pass_under_a_trainer_equals_the_function(
    kind: str,
    tasks: Tasks,
    calibration: Any,
    small_config: NetworkConfig,
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    network = build_network(small_config, 3).double()
    options = FisherOptions(kind, mc_samples=2 if kind == "monte_carlo" else None)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3 * 100_003)
    expected = fisher_sums(network, calibration, options, generator=generator)
    path = tmp_path / "a.fisher.safetensors"
    for _ in range(2):  # a second run starts from nothing
        costs = estimate_over_tasks(make_trainer(), network, tasks, options, path)
        found = open_statistic(path, statistic="fisher", weights=fingerprint(network.state_dict()))
        assert (found.provenance["samples"], costs["passes"]) == (20, expected.passes)
        for name, value in expected.mean().items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_fewer_samples_than_processes_are_refused_in_one_line(
    tasks: Tasks,
    small_config: NetworkConfig,
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(Trainer, "world_size", 21)
    with pytest.raises(ConfigurationError, match="found 20 calibration samples for 21 processes"):
        estimate_over_tasks(
            make_trainer(), build_network(small_config, 3), tasks, None, tmp_path / "x"
        )


def close_to(expected: dict[str, torch.Tensor], found: Any) -> None:
    """Check a Fisher in single precision, an entry of which is as precise as the tensor's gradients on the whole."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * float(value.max()))


@pytest.mark.parametrize("pooled", [False, True])
def test_fisher_writes_the_diagonal_over_a_task_or_over_several(
    pooled: bool, tasks: Tasks, synthetic: Any, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    expert = Expert(**SMALL, num_classes=3, initial_seed=4)
    task = synthetic(seed=6)
    data = tasks if pooled else task
    make_trainer().fisher(expert, data, samples_per_task=9)
    same = tasks.tasks if pooled else {"task": task}
    samples = Tasks(same, 9)
    expected = fisher_sums(expert.network, samples.calibration())
    found = open_statistic(tmp_path / "run/expert.fisher.safetensors", statistic="fisher")
    close_to(expected.mean(), found)
    made = found.provenance
    assert (made["kind"], made["samples"], made["passes"]) == (
        "exact",
        9 * len(same),
        expected.passes,
    )
    assert (made["data"], made["seed"]) == (("pooled", 3) if pooled else ("own", 6))


@pytest.fixture
def checkpoints(
    synthetic: Any, write_experts: Any, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> list[str]:
    """One expert as its file and as a Lightning checkpoint, and a checkpoint of another network."""
    path = write_experts([3])["task0"]
    expert = Expert(**SMALL, num_classes=3)
    expert.network.load_state_dict(load_network(Path(path)).network.state_dict())
    trainer = make_trainer(max_epochs=0)
    trainer.fit(expert, datamodule=synthetic())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.save({"state_dict": {"network.fc.weight": torch.ones(1)}}, tmp_path / "other.ckpt")
    return [path, str(tmp_path / "last.ckpt")]


def test_fisher_reads_both_kinds_of_checkpoint(
    checkpoints: list[str], synthetic: Any, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    network = load_network(Path(checkpoints[0])).network
    for checkpoint in checkpoints:
        expert = Expert(**SMALL, num_classes=3)
        make_trainer().fisher(
            expert, synthetic(), checkpoint, samples_per_task=10, statistic="gram"
        )
        path = tmp_path / "run/expert.gram.safetensors"
        found = open_statistic(path, statistic="gram", weights=fingerprint(network.state_dict()))
        assert found.provenance["samples"] == 10
        path.unlink()


MISTAKES = {
    "no checkpoint": ({"ckpt_path": "none.ckpt"}, "found no file 'none.ckpt'"),
    "no expert's file": ({"ckpt_path": "none.safetensors"}, "found no file"),
    "another network": (
        {"ckpt_path": "other.ckpt"},
        "other.ckpt' has no tensor 'fc.bias'.*of another architecture",
    ),
    "too many samples": (
        {"samples_per_task": 99},
        "99 calibration samples of .*, expected at most",
    ),
    "no statistic": ({"statistic": "grm"}, "found statistic='grm'.*did you mean gram"),
    "no network": ({"model": Expert(**SMALL)}, "found a model without a network"),
}


@pytest.mark.usefixtures("checkpoints", "elsewhere")
@pytest.mark.parametrize("case", MISTAKES)
def test_what_fisher_cannot_use_is_named(
    case: str, synthetic: Any, make_trainer: Callable[..., Trainer]
) -> None:
    options, message = MISTAKES[case]
    with pytest.raises(CoinError, match=message):
        make_trainer().fisher(
            **{"model": Expert(**SMALL, num_classes=3), "datamodule": synthetic(), **options}
        )
