import pytest
import torch

from coin.data import Augmentation, Calibration, TaskData, pooled, to_input
from coin.errors import DataError

DRAWS = {"train": TaskData.calibration, "validation": TaskData.promise_samples}
"""What is drawn of which split."""


def numbered(count, side=8, first=0, image_size=8):
    """Return calibration images whose pixels are the sample's number."""
    every = torch.arange(first, first + count, dtype=torch.uint8)
    images = every.view(-1, 1, 1, 1).expand(-1, 1, side, side)
    return Calibration.of([images], image_size, batch_size=4)


def stored(calibration):
    """Return the images of one task's calibration samples, in their order."""
    (images,) = calibration.stored
    return images[calibration.indices[:, 1]]


def numbers(calibration):
    return stored(calibration)[:, 0, 0, 0].tolist()


def rows(images):
    """Return images as values that can be compared and found."""
    return [tuple(pixels) for pixels in images.flatten(1).tolist()]


@pytest.mark.parametrize("split", DRAWS)
def test_the_seed_alone_draws_different_samples_of_the_split(split, synthetic):
    def drawn(count, **options):
        task = synthetic(train=200, **options)
        return rows(stored(DRAWS[split](task, count)))

    of_split, _ = getattr(synthetic(train=200).splits, split)[:]
    global_state = torch.manual_seed(7).get_state()
    first = drawn(30)
    assert set(first) <= set(rows(of_split))
    assert len(set(first)) == 30
    assert drawn(30, augmentation=Augmentation.crop, batch_size=9) == first
    assert drawn(20) == first[:20]
    assert drawn(30, seed=1) != first
    assert torch.equal(torch.get_rng_state(), global_state)


def test_iterating_gives_the_unaugmented_inputs_in_batches_every_time(synthetic):
    task = synthetic(train=100, augmentation=Augmentation.crop, image_size=24)
    calibration = task.calibration(70, batch_size=32)
    batches = list(calibration)
    assert [len(batch) for batch in batches] == [32, 32, 6]
    expected = to_input(stored(calibration), 24)
    torch.testing.assert_close(torch.cat(batches), expected)
    torch.testing.assert_close(torch.cat(list(calibration)), expected)


@pytest.mark.parametrize(
    ("split", "count", "message"),
    [
        ("train", 41, "found 41 calibration .* of x, expected at most 40, .* samples_per_task"),
        ("validation", 1, "found 1 promise .* of x, expected at most 0, .*validation_share"),
    ],
)
def test_more_samples_than_there_are_are_refused_with_both_numbers(
    split, count, message, synthetic
):
    task = synthetic(train=40, validation_share=0.0)
    assert task.calibration(40).num_samples == 40
    with pytest.raises(DataError, match=message):
        DRAWS[split](task, count, name="x")


@pytest.mark.parametrize(("share", "held_out"), [(0.2, 2), (0.001, 1), (0.5, 5)])
def test_a_split_holds_out_the_last_samples(share, held_out):
    fitted, tuned = numbered(10).split(share)
    assert numbers(fitted) + numbers(tuned) == list(range(10))
    assert tuned.num_samples == held_out


def test_one_sample_cannot_be_split():
    with pytest.raises(DataError, match="1 calibration sample"):
        numbered(1).split(0.5)


@pytest.mark.parametrize("places", [[7, 2, 2], range(1, 10, 3)])
def test_a_subset_has_its_samples_in_the_given_order(places):
    assert numbers(numbered(10).subset(places)) == list(places)


def test_pooled_tasks_are_interleaved_whatever_their_images():
    few = numbered(4, side=6, first=100, image_size=12)
    many = numbered(8, image_size=12)
    both = pooled([many, few])
    assert both.part.tolist() == [0, 1, 0] * 4
    inputs = both.inputs()
    torch.testing.assert_close(inputs[both.part == 0], many.inputs())
    torch.testing.assert_close(inputs[both.part == 1], few.inputs())
    torch.testing.assert_close(both.inputs(torch.tensor([4, 0])), inputs[[4, 0]])
    _, held_out = both.split(0.25)
    assert held_out.part.bincount().tolist() == [2, 1]
    again = pooled([both, numbered(3, first=200, image_size=12)])
    assert again.part.bincount().tolist() == [8, 4, 3]


def test_pooled_tasks_have_one_image_size():
    with pytest.raises(DataError, match=r"image sizes \[8, 16\]; expected one common size"):
        pooled([numbered(4), numbered(4, image_size=16)])


def test_inputs_in_memory_are_batches_of_one_shape_in_their_order():
    short = torch.arange(6.0).view(3, 2)
    long = torch.arange(12.0).view(4, 3)
    given = Calibration.of([short, long])
    first, second = given
    assert torch.equal(first, short)
    assert torch.equal(second, long)
    assert [len(batch) for batch in given.subset([0, 3, 1, 4, 5])] == [1, 1, 1, 2]
    with pytest.raises(DataError, match="to run together, expected one shape"):
        given.inputs()
    named = Calibration.of([{"x": short}])
    assert torch.equal(named.inputs(torch.tensor([2, 0]))["x"], short[[2, 0]])
