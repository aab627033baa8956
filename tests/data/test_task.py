import gc
import pickle
import weakref
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule

from coin.data import Augmentation, Samples, Source, TaskData, to_input
from coin.data.tasks import task_with
from coin.errors import ConfigurationError, DataError


class Numbered(TaskData):
    """Images whose pixels spell the sample's number, so that a test can follow every sample."""

    names = ("a", "b", "c", "d")
    reads: ClassVar[list[int]] = []

    def __init__(self, train: int = 200, test: int = 60, side: int = 8, **kwargs: Any) -> None:
        super().__init__(**{"image_size": side, **kwargs})
        self.counts, self.side = (train, test), side

    def load(self):
        self.reads.append(self.image_size)
        train, test = self.counts
        numbers = torch.arange(train + test)
        images = torch.zeros(train + test, 1, self.side, self.side, dtype=torch.uint8)
        images[:, 0, 0, 0] = numbers % 256
        images[:, 0, 0, 1] = numbers // 256
        everything = Samples.of(images, numbers % 4)
        return Source(everything.subset(range(train)), everything.subset(range(train, train + test)))


def numbers(images):
    return (images[:, 0, 0, 0].int() + 256 * images[:, 0, 0, 1].int()).tolist()


def order(loader):
    return [number for images, _ in loader for number in numbers(images)]


def by_sample(task, on_process, epoch=0):
    """The training images in the order of their positions, as an epoch shows them."""
    plain = order(on_process(task_with(task, augmentation=Augmentation.none), 0, 1, epoch).train_dataloader())
    loader = on_process(task, 0, 1, epoch).train_dataloader()
    return torch.cat([images for images, _ in loader])[torch.tensor(plain).argsort()]


def splits(task):
    parts = (task.splits.train, task.splits.validation, task.splits.test)
    return [set(numbers(images)) for images, _ in (part[:] for part in parts)]


def test_splits_are_disjoint_complete_stratified_and_of_the_split_seed_alone():
    train, validation, test = splits(Numbered())
    assert train | validation == set(range(200))
    assert test == set(range(200, 260))
    assert not train & validation
    assert torch.bincount(torch.tensor(sorted(validation)) % 4).tolist() == [5, 5, 5, 5]
    assert splits(Numbered(seed=1)) == splits(Numbered(max_train=10_000, max_test=10_000)) == [train, validation, test]
    assert splits(Numbered(split_seed=1)) != [train, validation, test]
    whole = Numbered(validation_share=0.0)
    assert len(whole.splits.validation) == 0
    assert whole.val_dataloader() == []
    assert len(whole.splits.train) == 200


def test_limits_keep_stratified_subsets_of_the_same_splits():
    every, few = splits(Numbered()), splits(Numbered(max_train=40, max_test=12))
    assert [len(part) for part in few] == [40, round(20 * 40 / 180), 12]
    assert all(part < whole for part, whole in zip(few, every, strict=True))
    assert torch.bincount(torch.tensor(sorted(few[2])) % 4).tolist() == [3, 3, 3, 3]


def test_loaders_yield_stored_images_with_their_labels():
    task = Numbered(batch_size=32, eval_batch_size=50)
    own = task.splits
    loaders = task.train_dataloader(), task.val_dataloader(), task.test_dataloader()
    for loader, split in zip(loaders, (own.train, own.validation, own.test), strict=True):
        seen = []
        for images, labels in loader:
            assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
            assert labels.tolist() == [number % 4 for number in numbers(images)]
            seen += numbers(images)
        assert sorted(seen) == numbers(split[:][0])
    assert [len(images) for images, _ in task.predict_dataloader()] == [50, 10]
    assert len(task.train_dataloader()) == 6
    assert (task.classes, task.num_classes) == (("a", "b", "c", "d"), 4)
    images, labels = next(iter(task.test_dataloader()))
    x, y = task.on_after_batch_transfer((images, labels), 0)
    assert torch.equal(x, to_input(images, 8))
    assert torch.equal(y, labels)
    task.trainer = SimpleNamespace(predicting=True)
    assert torch.equal(task.on_after_batch_transfer((images, labels), 0), x)


def test_training_order_follows_the_seed_and_no_loader_moves_torchs_own_random_state():
    task, state = Numbered(seed=5), torch.manual_seed(1).get_state()
    assert order(task.train_dataloader()) != order(Numbered(seed=6).train_dataloader())
    assert len(order(task.val_dataloader()) + order(task.test_dataloader())) == 80
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_touches_training_images_only_and_changes_with_the_epoch_but_not_with_the_batch(on_process):
    plain, augmented = Numbered(), Numbered(augmentation=Augmentation.crop)
    for name in ("val_dataloader", "test_dataloader"):
        for (a, _), (b, _) in zip(getattr(augmented, name)(), getattr(plain, name)(), strict=True):
            assert torch.equal(a, b)
    same = Numbered(augmentation=Augmentation.crop, batch_size=60)
    other = Numbered(augmentation=Augmentation.crop, seed=1)

    def shown(task, epoch):
        return by_sample(task, on_process, epoch)

    assert torch.equal(shown(augmented, 1), shown(same, 1))
    assert not torch.equal(shown(augmented, 0), shown(augmented, 1))
    assert not torch.equal(shown(augmented, 0), shown(other, 0))
    assert torch.equal(shown(plain, 0), shown(plain, 1))
    assert not torch.equal(shown(plain, 0), shown(augmented, 0))


def test_copies_read_once_until_one_releases_it():
    Numbered.reads.clear()
    given = Numbered()
    options = [{"seed": 1}, {"seed": 2, "batch_size": 3}, {"augmentation": Augmentation.crop}]
    copies = [task_with(given, **each) for each in options]
    first = copies[0].splits
    assert [each.splits for each in copies] == [first] * 3
    assert given.splits is first
    larger = task_with(given, image_size=12)
    assert larger.splits is not first
    assert Numbered.reads == [8, 12]
    assert pickle.loads(pickle.dumps(copies[0])).splits.train.indices.equal(first.train.indices)
    assert len(task_with(given, max_train=20).splits.train) == 20
    seen = weakref.ref(first.train.dataset)
    del first, larger
    gc.collect()
    assert seen() is not None
    given.release()
    assert seen() is None
    assert len(copies[0].splits.train) == 180  # read again


def test_two_processes_share_the_samples_and_lightning_does_not_share_them_again(on_process):
    ranks = [on_process(Numbered(test=61), rank, 2) for rank in range(2)]
    assert task_with(ranks[1]).trainer is None
    assert sorted(order(ranks[0].test_dataloader()) + order(ranks[1].test_dataloader())) == list(range(200, 261))
    first, second = (order(task.train_dataloader()) for task in ranks)
    assert sorted(first + second) == sorted(order(Numbered().train_dataloader()))
    predicted = [order(task.predict_dataloader()) for task in ranks]
    assert sorted(predicted[0] + predicted[1]) == list(range(200, 261))


def test_calibration_and_promise_samples_are_in_no_test_and_equal_on_any_number_of_processes(on_process):
    train, validation, _ = splits(Numbered())
    expected = Numbered(seed=3)
    for rank, world in ((0, 1), (0, 2), (1, 2), (2, 3)):
        task = on_process(Numbered(seed=3), rank, world)
        for draw, split in ((TaskData.calibration, train), (TaskData.promise_samples, validation)):
            (images,) = draw(task, 15).stored
            assert len(set(numbers(images)) & split) == 15
            assert torch.equal(draw(task, 15).inputs(), draw(expected, 15).inputs())


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.epochs: dict[int, list[int]] = {}

    def training_step(self, batch, batch_idx):
        assert batch[0].shape[1:] == (3, 8, 8)
        seen = ((batch[0][:, 0, 0, 0] * 0.229 + 0.485) * 255).round().int().tolist()
        self.epochs.setdefault(self.current_epoch, []).extend(seen)
        return (self.weight * batch[0].mean()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_trainer_sees_the_order_of_a_plain_loop_also_when_it_resumes(tmp_path, make_trainer, on_process):
    options = {"train": 150, "test": 40, "seed": 2, "validation_share": 0.0}
    recorder, stopped, resumed = Recorder(), make_trainer(max_epochs=1), Recorder()
    make_trainer(max_epochs=3).fit(recorder, datamodule=Numbered(**options))
    for epoch in range(3):
        assert recorder.epochs[epoch] == order(on_process(Numbered(**options), 0, 1, epoch).train_dataloader())
    stopped.fit(Recorder(), datamodule=Numbered(**options))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    make_trainer(max_epochs=3).fit(resumed, datamodule=Numbered(**options), ckpt_path=tmp_path / "stopped.ckpt")
    assert resumed.epochs == {epoch: recorder.epochs[epoch] for epoch in (1, 2)}


def test_options_are_checked_at_construction():
    wrong = {"image_size": 0, "batch_size": 1, "eval_batch_size": 0, "max_train": 1, "max_test": 0, "split_seed": -1}
    for name, value in (wrong | {"seed": -1}).items():
        with pytest.raises(
            ConfigurationError, match=f"{name}={value}, expected a whole number of at least {value + 1}"
        ):
            Numbered(**{name: value})
    for share in (1.0, -0.1):
        with pytest.raises(ConfigurationError, match=f"share={share}, expected a number at least 0 and below 1"):
            Numbered(validation_share=share)
    with pytest.raises(ConfigurationError, match="found augmentation='rotate', expected one of none, crop"):
        Numbered(augmentation="rotate")


def test_what_leaves_nothing_to_train_on_is_refused():
    for share, samples in ((0.99, 20), (0.5, 1)):
        with pytest.raises(ConfigurationError, match=f"validation_share {share} of {samples} samples leaves none"):
            Numbered(train=samples, validation_share=share).setup()


def test_sources_are_checked(monkeypatch):
    images, labels = torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 4
    good = Samples.of(images, labels)
    for source, message in (
        (Source(good, Samples.of(images, torch.arange(8) + 1)), "test labels 1 to 8; expected 0 to 3"),
        (Source(good, good.subset([])), "no test images, expected at least one; check its source"),
        (Source(Samples.of(images.float(), labels), good), r"images are torch\.float32"),
    ):
        monkeypatch.setattr(Numbered, "load", lambda task, source=source: source)
        with pytest.raises(DataError, match=message):
            Numbered().setup()
    monkeypatch.setattr(Numbered, "names", ("a",))
    with pytest.raises(DataError, match="Numbered has 1 class, expected at least two to tell apart"):
        Numbered().setup()
