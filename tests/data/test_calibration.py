import pytest
import torch

from coin.data import Augmentation, Calibration, Digits, Samples, pooled, to_input
from coin.errors import ConfigurationError, DataError

pytest.importorskip("sklearn")


def numbered(count, side=8, channels=1, first=0, image_size=8, batch_size=4):
    images = torch.zeros(count, channels, side, side, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(first, first + count)[:, None]
    return Calibration.of(Samples.of(images, torch.arange(count) % 3), image_size, batch_size)


def chosen(calibration):
    (part,) = calibration.parts
    return part.index[calibration.position].tolist()


def test_calibration_is_unaugmented_training_data_in_a_fixed_order():
    task = Digits(seed=1, augmentation=Augmentation.crop, image_size=16)
    calibration = task.calibration(200, batch_size=64)
    train, validation, test = (
        set(part.index.tolist()) for part in (task.splits.train, task.splits.validation, task.splits.test)
    )
    assert set(chosen(calibration)) <= train
    assert not set(chosen(calibration)) & (validation | test)
    assert len(set(chosen(calibration))) == 200
    stored = task.splits.train.store[torch.tensor(chosen(calibration))]
    assert torch.equal(calibration.labels, task.splits.train.labels[torch.tensor(chosen(calibration))])
    batches = list(calibration)
    assert [len(batch) for batch in batches] == [64, 64, 64, 8]
    assert len(calibration) == 4
    assert calibration.num_samples == 200
    assert torch.equal(torch.cat(batches), to_input(stored, 16))
    assert all(torch.equal(a, b) for a, b in zip(batches, calibration, strict=True))


def test_promise_samples_are_validation_data_and_never_too_few():
    task = Digits(seed=1)
    most = len(task.splits.validation)
    drawn = chosen(task.promise(most - 1))
    assert len(set(drawn)) == most - 1
    assert set(drawn) <= set(task.splits.validation.index.tolist())
    assert chosen(task.promise(20)) == drawn[:20]
    assert chosen(Digits(seed=2).promise(20)) != drawn[:20]
    wanted = rf"{most + 1} promise samples asked of the task 'x' \(Digits\), whose validation split has {most}; .*share"
    with pytest.raises(DataError, match=wanted):
        task.promise(most + 1, name="x")
    with pytest.raises(DataError, match="validation split has 0"):
        Digits(validation_share=0.0).promise(1)


def test_the_seed_alone_chooses_the_samples():
    torch.manual_seed(0)
    first = chosen(Digits(seed=0).calibration(50))
    state = torch.manual_seed(7).get_state()
    assert chosen(Digits(seed=0).calibration(50)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert chosen(Digits(seed=1).calibration(50)) != first
    assert chosen(Digits(seed=0).calibration(20)) == first[:20]


def test_more_samples_than_there_are_is_an_error_with_both_numbers():
    task = Digits(max_train=100)
    assert task.calibration(100).num_samples == 100
    with pytest.raises(DataError, match="101 calibration samples asked of Digits, whose training split has 100"):
        task.calibration(101)
    with pytest.raises(ConfigurationError, match="calibration samples=0"):
        task.calibration(0)
    with pytest.raises(ConfigurationError, match="batch size=0"):
        task.calibration(10, batch_size=0)


def test_a_split_holds_out_the_last_samples_and_processes_take_every_sample_once():
    calibration = numbered(10)
    fit, held_out = calibration.split(0.2)
    assert chosen(fit) + chosen(held_out) == list(range(10))
    assert held_out.num_samples == 2
    assert [part.num_samples for part in calibration.split(0.001)] == [9, 1]
    assert [part.num_samples for part in calibration.split(0.999)] == [1, 9]
    shards = [calibration.subset(range(rank, 10, 3)) for rank in range(3)]
    assert sorted(position for shard in shards for position in chosen(shard)) == list(range(10))
    with pytest.raises(ConfigurationError, match=r"the held-out share=1\.0"):
        calibration.split(1.0)
    with pytest.raises(DataError, match="1 calibration sample"):
        numbered(1).split(0.5)


def test_pooled_data_mix_tasks_of_different_image_shapes():
    a, b = numbered(8, image_size=12), numbered(4, side=6, channels=3, first=100, image_size=12)
    both = pooled([a, b])
    assert both.part.tolist() == [0, 1, 0] * 4
    assert torch.equal(both.inputs()[both.part == 0], a.inputs())
    assert torch.equal(both.inputs()[both.part == 1], b.inputs())
    assert torch.equal(both.labels[both.part == 1], b.labels)
    assert both.split(0.25)[1].part.bincount().tolist() == [2, 1]


def test_pooling_pooled_data_is_pooling_all():
    a, b, c = (numbered(4, first=first) for first in (0, 50, 100))
    nested = pooled([pooled([a, b]), c])
    assert sorted(nested.inputs().flatten(1).unique(dim=0).tolist()) == sorted(
        torch.cat([each.inputs() for each in (a, b, c)]).flatten(1).unique(dim=0).tolist()
    )
    assert torch.equal(pooled([a]).inputs(), a.inputs())


def test_pooling_needs_one_image_size():
    with pytest.raises(DataError, match=r"image sizes \[8, 16\]; expected one common size"):
        pooled([numbered(4), numbered(4, image_size=16)])
    with pytest.raises(DataError, match=r"image sizes \[\]"):
        pooled([])


def test_samples_in_memory_are_calibration_data_too():
    """Batches of two shapes; pooled with another task's they keep their order, and a new shape begins a new batch."""
    short, long = torch.arange(6.0).reshape(3, 2), torch.arange(12.0).reshape(4, 3)
    one, other = Calibration.of_batches([short, long]), Calibration.of_batches([{"x": short}])
    assert (one.num_samples, one.batch_size, other.batch_size) == (7, 4, 3)
    assert all(torch.equal(*pair) for pair in zip(one, (short, long), strict=True))
    assert [len(batch) for batch in one.subset([0, 3, 1, 4, 5])] == [1, 1, 1, 2]
    assert torch.equal(other.inputs(torch.tensor([2, 0]))["x"], short[[2, 0]])
    both = pooled([one, Calibration.of_batches([10 + long])])
    assert both.part.tolist() == [0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0]
    with pytest.raises(DataError, match="to run together, expected one shape"):
        both.inputs()
