import pytest
import torch

from coin.data import Augmentation, Calibration, Digits, pooled, to_input
from coin.errors import DataError

pytest.importorskip("sklearn")


def numbered(count, side=8, channels=1, first=0, image_size=8, batch_size=4):
    images = torch.zeros(count, channels, side, side, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(first, first + count)[:, None]
    return Calibration.of([images], image_size, batch_size=batch_size)


def rows(images):
    """Return images as values that can be compared and found."""
    return [tuple(image.flatten().tolist()) for image in images]


def stored(calibration):
    """Return the images of one task's calibration samples, in their order."""
    (images,) = calibration.stored
    return images[calibration.indices[:, 1]]


def numbers(calibration):
    return stored(calibration)[:, 0, 0, 0].tolist()


def test_calibration_is_unaugmented_training_data_in_a_fixed_order():
    task = Digits(seed=1, augmentation=Augmentation.crop, image_size=16)
    calibration, train = task.calibration(200, batch_size=64), task.splits.train
    images, _ = train[:]
    assert set(rows(stored(calibration))) <= set(rows(images))
    assert len(set(rows(stored(calibration)))) == calibration.num_samples == 200
    batches = list(calibration)
    assert [len(batch) for batch in batches] == [64, 64, 64, 8]
    assert torch.equal(torch.cat(batches), to_input(stored(calibration), 16))
    assert all(torch.equal(a, b) for a, b in zip(batches, calibration, strict=True))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_seed_alone_chooses_samples_of_their_split(split):
    def draw(samples, **options):
        task = Digits(**options)
        return rows(stored(task.calibration(samples) if split == "train" else task.promise_samples(samples)))

    state = torch.manual_seed(7).get_state()
    first = draw(50)
    images, _ = getattr(Digits().splits, split)[:]
    assert set(first) <= set(rows(images))
    assert len(set(first)) == 50
    assert draw(50) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(50, seed=1) != first
    assert draw(20) == first[:20]


def test_more_samples_than_there_are_is_an_error_with_both_numbers():
    task = Digits(max_train=100, validation_share=0.0)
    assert task.calibration(100).num_samples == 100
    for draw, message in (
        (
            lambda: task.calibration(101),
            "101 calibration samples of Digits, expected at most 100, .* lower samples_per",
        ),
        (lambda: Digits().promise_samples(999, name="x"), "999 promise samples of x, expected at most 144, .*_share"),
        (lambda: task.promise_samples(1), "expected at most 0"),
    ):
        with pytest.raises(DataError, match=message):
            draw()


def test_a_split_holds_out_the_last_samples_and_processes_take_every_sample_once():
    calibration = numbered(10)
    fit, held_out = calibration.split(0.2)
    assert (numbers(fit), numbers(held_out)) == (list(range(8)), [8, 9])
    assert [part.num_samples for part in calibration.split(0.001)] == [9, 1]
    shards = [calibration.subset(range(rank, 10, 3)) for rank in range(3)]
    assert sorted(number for shard in shards for number in numbers(shard)) == list(range(10))
    with pytest.raises(DataError, match="1 calibration sample"):
        numbered(1).split(0.5)


def test_pooled_data_mix_tasks_of_different_image_shapes():
    a, b = numbered(8, image_size=12), numbered(4, side=6, channels=3, first=100, image_size=12)
    both = pooled([a, b])
    assert both.part.tolist() == [0, 1, 0] * 4
    assert torch.equal(both.inputs()[both.part == 0], a.inputs())
    assert torch.equal(both.inputs()[both.part == 1], b.inputs())
    assert both.split(0.25)[1].part.bincount().tolist() == [2, 1]
    more = pooled([both, numbered(3, first=200, image_size=12)])
    assert len(more.inputs().flatten(1).unique(dim=0)) == 15
    assert torch.equal(pooled([a]).inputs(), a.inputs())
    with pytest.raises(DataError, match=r"image sizes \[8, 16\]; expected one common size"):
        pooled([numbered(4), numbered(4, image_size=16)])


def test_samples_in_memory_are_calibration_data_too():
    """Batches of two shapes; pooled with another task's they keep their order, and a new shape begins a new batch."""
    short, long = torch.arange(6.0).reshape(3, 2), torch.arange(12.0).reshape(4, 3)
    one, other = Calibration.of([short, long]), Calibration.of([{"x": short}])
    assert one.num_samples == 7
    assert all(torch.equal(*pair) for pair in zip(one, (short, long), strict=True))
    assert [len(batch) for batch in one.subset([0, 3, 1, 4, 5])] == [1, 1, 1, 2]
    assert torch.equal(other.inputs(torch.tensor([2, 0]))["x"], short[[2, 0]])
    both = pooled([one, Calibration.of([10 + long])])
    assert both.part.tolist() == [0, 2, 0, 0, 2, 1, 2, 1, 1, 2, 1]
    with pytest.raises(DataError, match="to run together, expected one shape"):
        both.inputs()
