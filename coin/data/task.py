"""What all tasks have in common: options, splits, loaders and calibration data."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch import LightningDataModule

from coin.core.choices import check_integer, check_number, parse_enum
from coin.data.calibration import Calibration
from coin.data.loading import Batches
from coin.data.samples import Samples, Source, Splits, split_source
from coin.data.sampling import Stream, make_generator
from coin.data.transform import Augmentation, to_input
from coin.errors import ConfigurationError, DataError

T = TypeVar("T")
_LEAST = {
    "image_size": 1,
    "batch_size": 2,  # BatchNorm cannot train on one sample
    "eval_batch_size": 1,
    "max_train": 2,
    "max_test": 1,
    "split_seed": 0,
    "seed": 0,
}
"""Of the options that are whole numbers."""


class TaskData(LightningDataModule, ABC):
    """One task: images with their classes, or texts, of which tokens, int64 [B, L], take the place of images.

    All samples are read once and held in memory. The loaders yield stored images, uint8 [B, C, H, W], and labels, int64
    [B], of one process; `on_after_batch_transfer` turns the images into inputs on the device. A subclass gives the
    classes, in the order of their labels (`names`, or `classes` where finding them takes time), and reads the images
    (`load`), or texts if its `content` is ``texts``. Copies by `coin.data.tasks.task_with` share what is read.

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
    """

    names: tuple[str, ...]
    content: ClassVar[str] = "images"  # what networks read of it: images or texts
    # Options that change no result of an experiment, whose steps have batches and augmentations of their own.
    without_effect: ClassVar[frozenset[str]] = frozenset({"augmentation", "batch_size"})
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
        for name, least in _LEAST.items():
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least)
        check_number("validation_share", validation_share, low=0.0, high=1.0)
        self.check_augmentation(self.augmentation)
        self._shared: dict[str, Any] = {}  # by copies that read the same

    def check_augmentation(self, augmentation: Augmentation) -> None:
        """Refuse an augmentation of what are no images."""
        if self.content != "images" and augmentation is not Augmentation.none:
            found = f"augmentation '{augmentation}' for {type(self).__name__}, whose samples are {self.content}"
            raise ConfigurationError(f"found {found}, expected none")

    def content_key(self) -> dict[str, str]:
        """Hashes of a user's own files, those of the test samples by the name ``test``."""
        return {}

    @abstractmethod
    def load(self) -> Source:
        """Read the images; a `DataError` if they are missing or unusable."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels; networks are built with them before data are read."""
        return self.names

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens that texts are made of; None for images."""
        return None

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classes)

    def once(self, key: str, find: Callable[[], T]) -> T:
        """Return what `find` returns; it is called once for this task and all copies that read the same."""
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
    def splits(self) -> Splits:
        """The final splits, read once."""
        return self.once("splits", self._read_splits)

    def _read_splits(self) -> Splits:
        """Read and split the images; refuse what would fail much later and less clearly."""
        task = type(self).__name__
        last = self.num_classes - 1
        if last < 1:
            raise DataError(
                f"{task} has {last + 1} class, expected at least two to tell apart; add another"
            )
        source = self.load()
        for split, samples in vars(source).items():
            if samples is None:
                continue
            if not len(samples):
                raise DataError(
                    f"{task} has no {split} {self.content}, expected at least one; check its source"
                )
            least, most = map(int, samples.targets.aminmax())
            if least < 0 or most > last:
                raise DataError(
                    f"{task} has {split} labels {least} to {most}; expected 0 to {last}"
                )
            first, _ = samples[:1]
            to_input(first, self.image_size)  # which refuses other tensors
        return split_source(
            source, self.validation_share, self.split_seed, self.max_train, self.max_test
        )

    def train_dataloader(self) -> Batches:
        """Shuffled from (seed, epoch), augmented; equally many batches on every process."""
        train = self.splits.train
        return Batches(train, self.batch_size, self.trainer, self.seed, self.augmentation)

    def val_dataloader(self) -> Batches | list[Any]:
        """The validation split; an empty list, which Lightning takes for no validation, with a share of 0."""
        validation = self.splits.validation
        return Batches(validation, self.eval_batch_size, self.trainer) if validation else []

    def test_dataloader(self) -> Batches:
        """The test split."""
        return Batches(self.splits.test, self.eval_batch_size, self.trainer)

    def predict_dataloader(self) -> Batches:
        """The test split."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn stored images into inputs, float32 [B, 3, S, S], on the device; to predict, without the labels."""
        images, labels = batch
        inputs = to_input(images, self.image_size)
        is_prediction = self.trainer is not None and self.trainer.predicting
        return inputs if is_prediction else (inputs, labels)

    def calibration(
        self, samples: int, batch_size: int = 64, name: str | None = None
    ) -> Calibration:
        """P unaugmented training samples, drawn from ``seed`` without their labels; fewer are a prefix of more.

        A DataError, which has the task's `name`, where there are not as many.
        """
        return self._drawn(Stream.CALIBRATION, self.splits.train, samples, batch_size, name)

    def promise_samples(
        self, samples: int, batch_size: int = 64, name: str | None = None
    ) -> Calibration:
        """So many samples of the validation split, which experts were not trained on, drawn as `calibration` draws."""
        return self._drawn(Stream.PROMISE, self.splits.validation, samples, batch_size, name)

    def _drawn(
        self,
        stream: Stream,
        split: Samples,
        samples: int,
        batch_size: int,
        name: str | None,
    ) -> Calibration:
        most = len(split)
        if samples > most:
            raise DataError(
                f"found {samples} {stream.name.lower()} samples of {name or type(self).__name__}, "
                f"expected at most {most}, its split's size; lower samples_per_task or promise_samples, or change "
                "validation_share"
            )
        order = torch.randperm(most, generator=make_generator(self.seed, stream))
        stored, _ = split[order[:samples]]
        return Calibration.of([stored], self.image_size, batch_size=batch_size)
