import gc
import pickle
import weakref

import pytest
import torch

from coin.data import Augmentation, Samples, Source, TaskData, to_input
from coin.data.tasks import task_with
from coin.errors import ConfigurationError, DataError


class Numbered(TaskData):
    """Images whose first pixel is the sample's number, so that a test can follow every sample."""

    names = ("a", "b", "c", "d")

    def load(self):
        every = torch.arange(248)
        images = torch.zeros(248, 1, 8, 8, dtype=torch.uint8)
        images[:, 0, 0, 0] = every
        samples = Samples.of(images, every % 4)
        return Source(samples.subset(every[:200]), samples.subset(every[200:]))


def numbers(images):
    return images[:, 0, 0, 0].tolist()


def splits(task):
    """Return the numbers of the samples to train, to test and to validate on."""
    stored = [part[:][0] for part in task.splits]
    return [set(numbers(images)) for images in stored]


def classes_of(split):
    """Return how many samples of a set of numbers are of each class."""
    return torch.tensor(sorted(split)).remainder(4).bincount().tolist()


def test_splits_are_disjoint_complete_and_stratified():
    train, test, validation = splits(Numbered())
    assert train | validation == set(range(200))
    assert not train & validation
    assert test == set(range(200, 248))
    assert classes_of(validation) == [5, 5, 5, 5]


def test_samples_to_test_on_are_set_aside_where_the_source_has_none(monkeypatch):
    source = Source(Numbered().load().train)
    monkeypatch.setattr(Numbered, "load", lambda task: source)
    train, test, validation = splits(Numbered())
    assert [len(train), len(validation)] == [144, 16]
    assert train | validation | test == set(range(200))
    assert classes_of(test) == [10, 10, 10, 10]


@pytest.mark.parametrize(
    ("options", "is_same"),
    [
        ({"seed": 1}, True),
        ({"max_train": 10_000, "max_test": 10_000}, True),
        ({"split_seed": 1}, False),
    ],
)
def test_splits_follow_the_split_seed_alone(options, is_same):
    assert (splits(Numbered(**options)) == splits(Numbered())) is is_same


def test_without_a_share_nothing_is_validated():
    task = Numbered(validation_share=0.0)
    assert len(task.splits.train) == 200
    assert task.val_dataloader() == []


def test_limits_keep_stratified_subsets_of_the_same_splits():
    few = splits(Numbered(max_train=40, max_test=12))
    for part, whole in zip(few, splits(Numbered()), strict=True):
        assert part < whole
    assert [len(part) for part in few] == [40, 12, round(20 * 40 / 180)]
    assert classes_of(few[1]) == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("loader", "split", "size"),
    [("train", "train", 32), ("val", "validation", 9), ("test", "test", 9), ("predict", "test", 9)],
)
def test_processes_share_the_stored_images_of_a_split_in_batches(loader, split, size, on_process):
    global_state = torch.manual_seed(1).get_state()
    for_training = Augmentation.none if loader == "train" else Augmentation.crop
    seen = []
    sizes = []
    for rank in range(2):
        task = Numbered(batch_size=32, eval_batch_size=9, augmentation=for_training)
        on_process(task, rank, 2)
        for images, labels in getattr(task, f"{loader}_dataloader")():
            assert images.dtype == torch.uint8
            assert labels.tolist() == [number % 4 for number in numbers(images)]
            seen += numbers(images)
            sizes.append(len(images))
    images, _ = getattr(Numbered().splits, split)[:]
    assert sorted(seen) == numbers(images)
    assert max(sizes) == size
    assert torch.equal(torch.get_rng_state(), global_state)


def test_batches_become_inputs_without_labels_to_predict(on_process):
    task = on_process(Numbered(image_size=8), 0, 1)
    images, labels = next(iter(task.test_dataloader()))
    inputs, same = task.on_after_batch_transfer((images, labels), 0)
    torch.testing.assert_close(inputs, to_input(images, 8))
    assert torch.equal(same, labels)
    task.trainer.predicting = True
    predicted = task.on_after_batch_transfer((images, labels), 0)
    torch.testing.assert_close(predicted, inputs)


def shown(on_process, epoch=0, **options):
    """Return the training images of an epoch in the order of their positions."""
    plain = on_process(Numbered(**options), 0, 1, epoch)
    task = on_process(Numbered(augmentation=Augmentation.crop, **options), 0, 1, epoch)
    order = torch.cat([images[:, 0, 0, 0] for images, _ in plain.train_dataloader()])
    images = torch.cat([images for images, _ in task.train_dataloader()])
    return images[order.argsort()]


def test_augmentation_changes_with_the_epoch_and_the_seed_but_not_with_the_batch(on_process):
    first = shown(on_process)
    assert torch.equal(shown(on_process, batch_size=60), first)
    assert not torch.equal(shown(on_process, epoch=1), first)
    assert not torch.equal(shown(on_process, seed=1), first)


@pytest.mark.parametrize(
    ("options", "is_shared"),
    [
        ({"seed": 1}, True),
        ({"batch_size": 3}, True),
        ({"augmentation": Augmentation.crop}, True),
        ({"image_size": 12}, False),
        ({"max_train": 20}, False),
        ({"split_seed": 1}, False),
    ],
)
def test_copies_share_what_they_read_alike(options, is_shared):
    given = Numbered()
    first = task_with(given, **options).splits
    assert (given.splits is first) is is_shared


def test_what_was_read_is_freed_and_read_again():
    task = Numbered()
    copy = task_with(task, seed=1)
    seen = weakref.ref(task.splits.train.dataset)
    task.release()
    gc.collect()
    assert seen() is None
    assert len(copy.splits.train) == 180


def test_a_task_is_pickled_with_what_it_read():
    task = Numbered()
    indices = task.splits.train.indices
    assert torch.equal(pickle.loads(pickle.dumps(task)).splits.train.indices, indices)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("image_size", 0, "a whole number of at least 1"),
        ("batch_size", 1, "a whole number of at least 2"),
        ("eval_batch_size", 0, "a whole number of at least 1"),
        ("max_train", 1, "a whole number of at least 2"),
        ("max_test", 0, "a whole number of at least 1"),
        ("split_seed", -1, "a whole number of at least 0"),
        ("seed", -1, "a whole number of at least 0"),
        ("validation_share", 1.0, "a number at least 0 and below 1"),
        ("validation_share", -0.1, "a number at least 0 and below 1"),
        ("augmentation", "rotate", "one of none, crop"),
    ],
)
def test_options_are_checked_at_construction(option, value, expected):
    with pytest.raises(ConfigurationError, match=f"found {option}={value!r}, expected {expected}"):
        Numbered(**{option: value})


IMAGES = torch.zeros(20, 1, 4, 4, dtype=torch.uint8)
GOOD = Samples.of(IMAGES, torch.arange(20) % 4)
SOURCES = {
    "test labels 1 to 20; expected 0 to 3": Source(GOOD, Samples.of(IMAGES, torch.arange(20) + 1)),
    "train labels -1 to 2; expected 0 to 3": Source(Samples.of(IMAGES, torch.arange(20) % 4 - 1)),
    "no test images, expected at least one; check its source": Source(GOOD, GOOD.subset([])),
    "images are torch.float32": Source(Samples.of(IMAGES.float(), torch.zeros(20))),
}


@pytest.mark.parametrize("message", SOURCES)
def test_sources_are_checked(message, monkeypatch):
    monkeypatch.setattr(Numbered, "load", lambda task: SOURCES[message])
    with pytest.raises(DataError, match=message):
        Numbered().setup()


@pytest.mark.parametrize(("share", "samples"), [(0.99, 20), (0.5, 1)])
def test_a_share_that_leaves_nothing_to_train_on_is_refused(share, samples, monkeypatch):
    source = Source(GOOD.subset(range(samples)), GOOD)
    monkeypatch.setattr(Numbered, "load", lambda task: source)
    message = f"validation_share {share} of {samples} samples leaves none"
    with pytest.raises(ConfigurationError, match=message):
        Numbered(validation_share=share).setup()


def test_one_class_is_refused(monkeypatch):
    monkeypatch.setattr(Numbered, "names", ("a",))
    message = "Numbered has 1 class, expected at least two to tell apart"
    with pytest.raises(DataError, match=message):
        Numbered().setup()
