"""What all tasks have in common: options, splits, loaders and calibration data."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from coin.core.choices import check_integer, check_number, parse_enum
from coin.core.processes import cores
from coin.data.samples import BatchDataset, Calibration, Samples, Source, split_source
from coin.data.sampling import Stream, batch_loader, seeded
from coin.data.transform import Augmentation, check_stored, to_input
from coin.errors import ConfigurationError, DataError

T = TypeVar("T")
Loader = DataLoader[tuple[Tensor, Tensor]]
"""Of stored samples and labels."""

WORKERS = 8  # at most so many processes decode images that are not held in memory, by default

_LEAST = {
    "image_size": 1,
    "batch_size": 2,  # BatchNorm cannot train on one sample
    "eval_batch_size": 1,
    "max_train": 2,
    "max_test": 1,
    "split_seed": 0,
    "seed": 0,
    "num_workers": 0,
}
"""Of the options that are whole numbers."""


class Shared(dict[Hashable, Any]):
    """What all copies of a task in one process share; a pickled copy begins with nothing."""

    def __reduce__(self) -> tuple[type["Shared"], tuple[()]]:
        return Shared, ()


def unusable_files(
    task: str,
    folder: Path,
    download: bool,
    error: Exception,
) -> DataError:
    """Return the error for files that are missing or damaged, or could not be downloaded."""
    failed = "the download failed and " if download else ""
    reason = str(error)[:200] or type(error).__name__
    return DataError(
        f"{task}: {failed}there are no usable files in {folder.absolute()} ({reason}); "
        "copy them there and set download: false, or set download: true and use a Trainer"
    )


class TaskData(LightningDataModule, ABC):
    """One task: images with their classes, or texts, of which tokens, int64 [B, L], take the place of images.

    The loaders yield stored images, uint8 [B, C, H, W], and labels, int64 [B]; `on_after_batch_transfer` turns the
    images into inputs on the device. Samples are sharded over processes by index: set the Trainer's
    ``use_distributed_sampler=False``. A subclass gives the classes, in the order of their labels (`names`, or
    `class_names` where finding them takes time), and reads the images (`load`), or texts if its `content` is ``texts``.
    Copies by `coin.data.tasks.task_with` share what is read.

    Args:
        image_size: Side of the networks' inputs in pixels.
        batch_size: Training samples a batch and process, at least 2.
        eval_batch_size: Samples a batch in validation, test and prediction.
        validation_share: Share of the training samples for validation, in [0, 1), where the source has no such split.
        split_seed: Decides which samples are in which split.
        seed: Decides the training samples' order and augmentation, and the calibration samples. None is 0, or
            ``--seed_everything`` on the command line.
        augmentation: The augmentation of training images.
        max_train: The largest number of training samples, a stratified choice; validation shrinks in proportion.
        max_test: The largest number of test samples, a stratified choice.
        num_workers: Worker processes of each loader; with 0 only files that are decoded batch by batch have workers,
            one a core, 8 at most.
    """

    names: tuple[str, ...]
    content: ClassVar[str] = "images"  # what networks read of it: images or texts
    # Options that change no result of an experiment, whose steps have batches and augmentations of their own.
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"augmentation", "batch_size", "num_workers"}
    )
    for_tests: ClassVar[frozenset[str]] = frozenset({"eval_batch_size", "max_test"})

    def __init__(
        self,
        *,
        image_size: int = 32,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        validation_share: float = 0.1,
        split_seed: int = 0,
        seed: int | None = None,
        augmentation: Augmentation = Augmentation.none,
        max_train: int | None = None,
        max_test: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.validation_share = validation_share
        self.split_seed = split_seed
        self.seed = seed or 0
        self.augmentation = parse_enum(Augmentation, "augmentation", augmentation)
        self.max_train = max_train
        self.max_test = max_test
        self.num_workers = num_workers
        for name, least in _LEAST.items():
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least)
        check_number("validation_share", validation_share, low=0.0, high=1.0)
        self.check_augmentation(self.augmentation)
        self._shared = Shared()

    def check_augmentation(self, augmentation: Augmentation) -> None:
        """Refuse an augmentation of what are no images."""
        if self.content != "images" and augmentation is not Augmentation.none:
            found = f"augmentation '{augmentation}' for {type(self).__name__}, whose samples are {self.content}"
            raise ConfigurationError(f"found {found}, expected none")

    def class_names(self) -> tuple[str, ...]:
        """The classes in the order of their labels; a network is built with them before data are read."""
        return self.names

    def content_key(self) -> dict[str, str]:
        """Hashes of a user's own files, those of the test samples by the name ``test``."""
        return {}

    @abstractmethod
    def load(self) -> Source:
        """Read the images; a `DataError` if they are missing or unusable."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels."""
        return self.class_names()

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens that texts are made of; None for images."""
        return None

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classes)

    def check_files(self) -> None:
        """Refuse a user's own files that lack something, before anything is trained; a `DataError`."""

    def once(self, key: Hashable, find: Callable[[], T]) -> T:
        """Return what `find` returns; it is called once for this task and all its copies."""
        if key not in self._shared:
            self._shared[key] = find()
        found: T = self._shared[key]
        return found

    def release(self) -> None:
        """Free what was read; it is read again when it is needed."""
        self._shared.clear()

    def setup(self, stage: str | None = None) -> None:
        """Read the images and split them, once."""
        _ = self.splits

    @property
    def splits(self) -> Source:
        """The final splits, read once."""
        return self.once(self._key, self._read_splits)

    @property
    def _key(self) -> tuple[Any, ...]:
        return (
            self.image_size,
            self.validation_share,
            self.split_seed,
            self.max_train,
            self.max_test,
        )

    def _read_splits(self) -> Source:
        """Read and split the images; refuse what would fail much later and less clearly."""
        source = self.load()
        task = type(self).__name__
        count = len(self.class_names())
        if count < 2:
            raise DataError(
                f"{task} has {count} class, expected at least two to tell apart; add another"
            )
        for name, part in (
            ("training", source.train),
            ("test", source.test),
            ("validation", source.validation),
        ):
            if part is None:
                continue
            if not len(part):
                raise DataError(
                    f"{task} has no {name} {self.content}, expected at least one; check its source"
                )
            least, most = map(int, part.targets.aminmax())
            last = count - 1
            if least < 0 or most > last:
                raise DataError(f"{task} has {name} labels {least} to {most}; expected 0 to {last}")
            check_stored(part.images(torch.tensor([0])))
        return split_source(
            source, self.validation_share, self.split_seed, self.max_train, self.max_test
        )

    def train_dataloader(self) -> Loader:
        """Shuffled from (seed, epoch), augmented; equally many batches on every process."""
        self.check_augmentation(self.augmentation)
        return self._loader(self.splits.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Loader | list[Any]:
        """The validation split; an empty list, which Lightning takes for no validation, with a share of 0."""
        validation = self.splits.validation
        return [] if validation is None else self._loader(validation, self.eval_batch_size)

    def test_dataloader(self) -> Loader:
        """The test split."""
        return self._loader(self.splits.test, self.eval_batch_size, persistent_workers=False)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test images without their labels."""
        without_labels = itemgetter(0)
        return self._loader(
            self.splits.test,
            self.eval_batch_size,
            persistent_workers=False,
            collate_fn=without_labels,
        )

    def _loader(self, samples: Samples, batch_size: int, **options: Any) -> DataLoader[Any]:
        workers = self.num_workers
        if not workers and not isinstance(samples.store, Tensor):
            processes = 1 if self.trainer is None else self.trainer.num_devices
            workers = max(1, min(WORKERS, cores() // processes))
        usual = {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
        dataset = BatchDataset(samples, self.augmentation, self.seed)
        return batch_loader(dataset, batch_size, self.seed, self.trainer, **usual | options)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn the stored images of a batch into inputs, float32 [B, 3, S, S], on the device."""
        if isinstance(batch, Tensor):
            return to_input(batch, self.image_size)
        images, labels = batch
        return to_input(images, self.image_size), labels

    def calibration(
        self, samples: int, batch_size: int = 64, name: str | None = None
    ) -> Calibration:
        """P unaugmented training samples, drawn from ``seed`` without their labels; fewer are a prefix of more."""
        return self._drawn(self.splits.train, Stream.CALIBRATION, samples, batch_size, name)

    def promise(self, samples: int, batch_size: int = 64, name: str | None = None) -> Calibration:
        """So many samples of the validation split, which experts were not trained on, drawn as `calibration` draws."""
        validation = self.splits.validation
        if validation is None:
            validation = self.splits.train.subset([])
        return self._drawn(validation, Stream.PROMISE, samples, batch_size, name)

    def _drawn(
        self,
        part: Samples,
        stream: Stream,
        samples: int,
        batch_size: int,
        name: str | None,
    ) -> Calibration:
        most = len(part)
        if samples > most:
            kind = type(self).__name__
            task = f"the task '{name}' ({kind})" if name else kind
            use = stream.name.lower()
            split = "validation" if stream is Stream.PROMISE else "training"
            option = "promise_samples" if stream is Stream.PROMISE else "samples_per_task"
            raise DataError(
                f"{samples} {use} samples asked of {task}, whose {split} split has {most}; "
                f"set {option} to {most} or less, or change validation_share"
            )
        order = torch.randperm(most, generator=seeded(self.seed, stream))
        chosen = part.subset(order[:samples])
        key = (*self._key, self.seed, samples)
        latest_key, held = self._shared.get(stream, (None, None))
        if latest_key != key:
            held = chosen.held()
            self._shared[stream] = (key, held)  # the latest alone, for decoded images may be large
        return Calibration.of(held, self.image_size, batch_size)
