import pytest
import torch

from coin.data.tasks import Tasks
from coin.errors import ConfigurationError, DataError
from coin.modules import StatisticPass
from coin.networks import build_network
from coin.pipeline.steps.statistics import statistic_sums
from coin.statistics import FisherKind, fisher_sums
from coin.statistics.statistic import StatisticOptions


@pytest.fixture
def tasks(synthetic):
    tasks = Tasks({"a": synthetic(key=1), "b": synthetic(key=2)}, samples_per_task=10, batch_size=8)
    tasks.setup()
    return tasks


@pytest.mark.parametrize(
    ("kind", "mc_samples"), [("exact", None), ("categorical", None), ("empirical", None), ("monte_carlo", 2)]
)
def test_the_pass_under_a_trainer_equals_the_function(tasks, small_config, make_trainer, kind, mc_samples):
    network = build_network(small_config, 3).double()
    calibration = tasks.calibration()
    labels = calibration.labels if kind == "empirical" else None
    wanted = fisher_sums(
        network,
        calibration,
        kind=FisherKind(kind),
        labels=labels,
        mc_samples=mc_samples,
        generator=torch.Generator().manual_seed(3 * 100_003) if kind == "monte_carlo" else None,
    )
    module = StatisticPass(network, StatisticOptions(kind=kind, mc_samples=mc_samples), seed=3, labels=labels)
    trainer = make_trainer()
    assert trainer.predict_loop.inference_mode
    for _ in range(2):  # a second run starts from nothing
        trainer.predict(module, datamodule=tasks, return_predictions=False)
        assert (module.sums.count, module.sums.passes) == (20, wanted.passes)
        for name, value in wanted.values.items():
            torch.testing.assert_close(module.sums.values[name], value, rtol=1e-12, atol=0.0)
    assert module.seconds > 0
    assert all(p.grad is None for p in network.parameters())


def test_the_networks_layout_is_found_once_for_all_batches(tasks, small_config, make_trainer):
    network, sizes = build_network(small_config, 3), []
    network.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    make_trainer().predict(StatisticPass(network, StatisticOptions()), datamodule=tasks, return_predictions=False)
    first, *others = (len(batch) for batch in tasks.predict_dataloader())
    assert others
    assert sizes == [2, first, first, *others]  # the first batch a second time, in another order


@pytest.mark.parametrize("statistic", ["fisher", "gram"])
def test_fewer_samples_than_processes_are_refused_in_one_line(
    tasks, small_config, make_trainer, monkeypatch, statistic
):
    trainer = make_trainer()
    monkeypatch.setattr(type(trainer), "world_size", 21)
    with pytest.raises(ConfigurationError, match=r"found 20 calibration samples for 21 processes.*take fewer devices"):
        statistic_sums(trainer, build_network(small_config, 3), tasks, StatisticOptions(statistic))


def test_a_process_without_samples_has_no_sums_to_add(small_config, make_trainer):
    module = StatisticPass(build_network(small_config, 3), StatisticOptions())
    with pytest.raises(DataError, match=r"found no calibration samples on process 0 of 1.*raise the number"):
        make_trainer().predict(module, EmptyLoader())


class EmptyLoader:
    """Says that it has a batch, and has none."""

    def __len__(self) -> int:
        return 1

    def __iter__(self):
        return iter(())
