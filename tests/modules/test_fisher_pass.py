import pytest
import torch

from coin.data.tasks import Tasks
from coin.modules import StatisticPass
from coin.networks import build_network
from coin.statistics import FisherKind, fisher_sums


@pytest.fixture
def tasks(synthetic):
    tasks = Tasks({"a": synthetic(key=1), "b": synthetic(key=2)}, samples_per_task=10, batch_size=8)
    tasks.setup()
    return tasks


@pytest.mark.parametrize(
    ("kind", "cotangents"), [("exact", None), ("categorical", None), ("empirical", None), ("monte_carlo", 2)]
)
def test_the_pass_under_a_trainer_equals_the_function(tasks, small_config, make_trainer, kind, cotangents):
    network = build_network(small_config, 3).double()
    calibration = tasks.calibration()
    labels = calibration.labels if kind == "empirical" else None
    wanted = fisher_sums(
        network,
        calibration,
        kind=FisherKind(kind),
        labels=labels,
        cotangents=cotangents,
        generator=torch.Generator().manual_seed(3 * 100_003) if kind == "monte_carlo" else None,
    )
    module = StatisticPass(network, kind=FisherKind(kind), cotangents=cotangents, seed=3, labels=labels)
    trainer = make_trainer()
    assert trainer.predict_loop.inference_mode
    for _ in range(2):  # a second run starts from nothing
        trainer.predict(module, datamodule=tasks, return_predictions=False)
        assert (module.sums.count, module.sums.passes) == (20, wanted.passes)
        for name, value in wanted.values.items():
            torch.testing.assert_close(module.sums.values[name], value, rtol=1e-12, atol=0.0)
    assert module.seconds > 0
    assert all(p.grad is None for p in network.parameters())
