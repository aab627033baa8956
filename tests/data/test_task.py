import gc
import pickle
import weakref
from typing import Any, ClassVar

import pytest
import torch

from coin.data import Augmentation, Samples, Source, TaskData, to_input
from coin.data.tasks import task_with
from coin.errors import ConfigurationError, DataError

PROCESSES = [(0, 1), (0, 2), (1, 2), (2, 3)]
"""Ranks and world sizes."""


class Numbered(TaskData):
    """Images whose first two pixels spell the sample's number, so that a test can follow every sample."""

    names = ("a", "b", "c", "d")
    reads: ClassVar[list[int]] = []

    def __init__(self, train: int = 200, test: int = 60, **options: Any) -> None:
        super().__init__(**{"image_size": 8, **options})
        self.counts = (train, test)

    def load(self):
        self.reads.append(self.image_size)
        train, test = self.counts
        numbers = torch.arange(train + test)
        images = torch.zeros(train + test, 1, 8, 8, dtype=torch.uint8)
        images[:, 0, 0, 0] = numbers % 256
        images[:, 0, 0, 1] = numbers // 256
        every = Samples.of(images, numbers % 4)
        return Source(every.subset(range(train)), every.subset(range(train, train + test)))


def numbers(images):
    low = images[:, 0, 0, 0].int()
    high = images[:, 0, 0, 1].int()
    return (low + 256 * high).tolist()


def order(loader):
    """Return the numbers of a loader's samples."""
    return [number for images, _ in loader for number in numbers(images)]


def splits(task):
    """Return the numbers in each split."""
    return [
        set(numbers(part[:][0]))
        for part in (task.splits.train, task.splits.validation, task.splits.test)
    ]


def classes_of(split):
    """Return how many samples of a set of numbers are of each class."""
    return torch.tensor(sorted(split)).remainder(4).bincount().tolist()


def test_splits_are_disjoint_complete_and_stratified():
    train, validation, test = splits(Numbered())
    assert train | validation == set(range(200))
    assert not train & validation
    assert test == set(range(200, 260))
    assert classes_of(validation) == [5, 5, 5, 5]


def test_samples_to_test_on_are_set_aside_where_the_source_has_none(monkeypatch):
    every = Numbered().load().train
    monkeypatch.setattr(Numbered, "load", lambda task: Source(every))
    train, validation, test = splits(Numbered())
    assert [len(train), len(validation), len(test)] == [144, 16, 40]
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
    assert len(task.splits.validation) == 0
    assert task.val_dataloader() == []


def test_limits_keep_stratified_subsets_of_the_same_splits():
    few = splits(Numbered(max_train=40, max_test=12))
    for part, whole in zip(few, splits(Numbered()), strict=True):
        assert part < whole
    assert [len(part) for part in few] == [40, round(20 * 40 / 180), 12]
    assert classes_of(few[2]) == [3, 3, 3, 3]


@pytest.mark.parametrize("split", ["train", "val", "test", "predict"])
def test_loaders_yield_stored_images_of_their_split_with_their_labels(split):
    task = Numbered(batch_size=32, eval_batch_size=50)
    name = {"val": "validation", "predict": "test"}.get(split, split)
    expected, _ = getattr(task.splits, name)[:]
    seen = []
    for images, labels in getattr(task, f"{split}_dataloader")():
        assert images.dtype == torch.uint8
        assert len(images) <= (32 if split == "train" else 50)
        assert labels.tolist() == [number % 4 for number in numbers(images)]
        seen += numbers(images)
    assert sorted(seen) == numbers(expected)


def test_batches_become_inputs_on_the_device_without_labels_to_predict(on_process):
    task = on_process(Numbered(), 0, 1)
    images, labels = next(iter(task.test_dataloader()))
    inputs, same = task.on_after_batch_transfer((images, labels), 0)
    torch.testing.assert_close(inputs, to_input(images, 8))
    assert torch.equal(same, labels)
    task.trainer.predicting = True
    predicted = task.on_after_batch_transfer((images, labels), 0)
    torch.testing.assert_close(predicted, to_input(images, 8))


def test_training_order_follows_the_seed_and_no_loader_moves_torchs_own_random_state():
    global_state = torch.manual_seed(1).get_state()
    task = Numbered(seed=5)
    assert order(task.train_dataloader()) == order(Numbered(seed=5).train_dataloader())
    assert order(task.train_dataloader()) != order(Numbered(seed=6).train_dataloader())
    order(task.val_dataloader())
    order(task.test_dataloader())
    assert torch.equal(torch.get_rng_state(), global_state)


def shown(on_process, epoch=0, **options):
    """Return the training images of an epoch in the order of their positions."""
    plain = order(on_process(Numbered(**options), 0, 1, epoch).train_dataloader())
    task = on_process(Numbered(augmentation=Augmentation.crop, **options), 0, 1, epoch)
    images = torch.cat([images for images, _ in task.train_dataloader()])
    return images[torch.tensor(plain).argsort()]


def test_augmentation_changes_with_the_epoch_and_the_seed_but_not_with_the_batch(on_process):
    first = shown(on_process)
    assert torch.equal(shown(on_process, batch_size=60), first)
    assert not torch.equal(shown(on_process, epoch=1), first)
    assert not torch.equal(shown(on_process, seed=1), first)


def test_augmentation_touches_training_images_only():
    plain = Numbered()
    augmented = Numbered(augmentation=Augmentation.crop)
    assert order(augmented.val_dataloader()) == order(plain.val_dataloader())
    assert order(augmented.test_dataloader()) == order(plain.test_dataloader())
    assert order(augmented.train_dataloader()) != order(plain.train_dataloader())


@pytest.mark.parametrize(
    "options", [{"seed": 1}, {"batch_size": 3}, {"augmentation": Augmentation.crop}]
)
def test_copies_share_what_is_read(options):
    given = Numbered()
    first = task_with(given, **options).splits
    assert given.splits is first


@pytest.mark.parametrize("options", [{"image_size": 12}, {"max_train": 20}, {"split_seed": 1}])
def test_copies_that_read_something_else_read_it_themselves(options):
    Numbered.reads.clear()
    given = Numbered()
    assert task_with(given, **options).splits is not given.splits
    assert len(Numbered.reads) == 2


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


def test_two_processes_share_the_samples_and_lightning_does_not_share_them_again(on_process):
    def seen(loader):
        ranks = [on_process(Numbered(test=61), rank, 2) for rank in range(2)]
        return sorted(number for task in ranks for number in order(getattr(task, loader)()))

    assert seen("test_dataloader") == list(range(200, 261))
    assert seen("predict_dataloader") == list(range(200, 261))
    assert seen("train_dataloader") == sorted(order(Numbered().train_dataloader()))


@pytest.mark.parametrize(("rank", "world"), PROCESSES)
@pytest.mark.parametrize(
    ("draw", "split"), [(TaskData.calibration, 0), (TaskData.promise_samples, 1)]
)
def test_calibration_and_promise_samples_are_of_their_split_and_equal_on_every_process(
    draw, split, rank, world, on_process
):
    task = on_process(Numbered(seed=3), rank, world)
    found = draw(task, 15)
    (images,) = found.stored
    assert len(set(numbers(images)) & splits(task)[split]) == 15
    assert torch.equal(images, draw(Numbered(seed=3), 15).stored[0])


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


@pytest.mark.parametrize(("share", "samples"), [(0.99, 20), (0.5, 1)])
def test_a_share_that_leaves_nothing_to_train_on_is_refused(share, samples):
    with pytest.raises(
        ConfigurationError, match=f"validation_share {share} of {samples} samples leaves none"
    ):
        Numbered(train=samples, validation_share=share).setup()


IMAGES = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
GOOD = Samples.of(IMAGES, torch.arange(8) % 4)
SOURCES = {
    "labels": (
        Source(GOOD, Samples.of(IMAGES, torch.arange(8) + 1)),
        "test labels 1 to 8; expected 0 to 3",
    ),
    "negative": (
        Source(Samples.of(IMAGES, torch.arange(8) % 4 - 1)),
        "train labels -1 to 2; expected 0 to 3",
    ),
    "empty": (
        Source(GOOD, GOOD.subset([])),
        "no test images, expected at least one; check its source",
    ),
    "floats": (Source(Samples.of(IMAGES.float(), torch.zeros(8))), r"images are torch\.float32"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources_are_checked(case, monkeypatch):
    source, message = SOURCES[case]
    monkeypatch.setattr(Numbered, "load", lambda task: source)
    with pytest.raises(DataError, match=message):
        Numbered().setup()


def test_one_class_is_refused(monkeypatch):
    monkeypatch.setattr(Numbered, "names", ("a",))
    with pytest.raises(
        DataError, match="Numbered has 1 class, expected at least two to tell apart"
    ):
        Numbered().setup()
