"""What all tasks have in common: options, splits, loaders and calibration data."""

from abc import ABC, abstractmethod
from operator import itemgetter
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from coin.choices import chosen
from coin.data.augmentation import Augmentation, TransformSpec, build_transforms
from coin.data.calibration import Calibration
from coin.data.samples import BatchDataset, Samples, Shared, Source, split_source
from coin.data.sampling import EvaluationBatches, Stream, TrainingBatches, seeded
from coin.data.transform import check_stored, to_input
from coin.errors import ConfigurationError, DataError
from coin.processes import cores

WORKERS = 8
"""At most so many processes decode images that are not held in memory, unless it is said."""


class TaskData(LightningDataModule, ABC):
    """One task: images with their classes.

    The loaders yield stored images, uint8 [B, C, H, W], and labels, int64 [B] (`predict_dataloader` the test images
    alone); `on_after_batch_transfer` turns the images into inputs on the device. Used without a Trainer, that is
    `coin.data.to_input`. Samples are sharded over processes by index, so the Trainer runs with
    ``use_distributed_sampler=False``.

    A task of texts stores tokens, int64 [B, L], in the place of images (`coin.data.text`); all else is the same.

    A subclass says what the classes are (`class_names`, without reading images) and reads them (`load`). What has been
    read is shared by all copies of a task that `coin.data.tasks.task_with` makes, and kept as long as there is one.

    Args:
        image_size: Side of the networks' inputs in pixels; for texts, their number of tokens.
        batch_size: Training samples a batch and process, at least 2.
        eval_batch_size: Samples a batch in validation, test and prediction.
        validation_share: Share of the training samples that is set aside for validation, in [0, 1). With 0 there is
            no validation. Unused where the source has a validation split of its own.
        split_seed: Decides which samples are in which split.
        seed: Decides the order of the training samples, their augmentation and the choice of calibration samples. None
            is 0, and what ``--seed_everything`` says on the command line.
        augmentation: What happens to training images.
        transform: What happens to them after that: a transform of ``torchvision.transforms.v2``, such as
            ``{class_path: torchvision.transforms.v2.RandomResizedCrop, init_args: {size: 32}}``, or a list of them. It
            sees one image at a time, uint8 [1 or 3, H, W], and must return one, all of one size; its random numbers
            are a function of the seed, the epoch and the image.
        max_train: At most so many training samples, a stratified choice; validation shrinks in proportion.
        max_test: At most so many test samples, a stratified choice.
        num_workers: Worker processes of each loader; 0 works in the main process what is held in memory, and decodes
            what is not in a process a core, 8 at most.

    Raises:
        ConfigurationError: An option is out of range.
    """

    augmentations: ClassVar[tuple[Augmentation, ...]] = tuple(Augmentation)
    """What may happen to training samples."""
    content: ClassVar[str] = "images"
    """What networks read of it: ``images`` or ``texts``."""
    reads_at_size: ClassVar[bool] = True
    """Whether what `load` reads depends on ``image_size``."""

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
        transform: TransformSpec = None,
        max_train: int | None = None,
        max_test: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        at_least("image_size", image_size, 1)
        at_least("batch_size", batch_size, 2, why="BatchNorm cannot train on one sample")
        at_least("eval_batch_size", eval_batch_size, 1)
        at_least("split_seed", split_seed, 0)
        at_least("seed", seed or 0, 0)
        at_least("num_workers", num_workers, 0)
        if max_train is not None:
            at_least("max_train", max_train, 2)
        if max_test is not None:
            at_least("max_test", max_test, 1)
        if not 0 <= validation_share < 1:
            raise ConfigurationError(f"validation_share is {validation_share}; expected a number in [0, 1)")
        self.image_size = image_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.validation_share = validation_share
        self.split_seed = split_seed
        self.seed = seed or 0
        self.augmentation = self.check_augmentation(chosen(Augmentation, "augmentation", augmentation))
        self.transform = self.check_transform(transform)
        self.max_train = max_train
        self.max_test = max_test
        self.num_workers = num_workers
        self._shared = Shared()
        self._source: Source | None = None

    def check_augmentation(self, augmentation: Augmentation) -> Augmentation:
        """Return an augmentation that makes sense for the task's samples.

        Raises:
            ConfigurationError: It does not.
        """
        if augmentation not in self.augmentations:
            raise ConfigurationError(
                f"found augmentation '{augmentation}' for {type(self).__name__}, expected one of "
                f"{', '.join(self.augmentations)}; set augmentation of the task, the expert or the method"
            )
        return augmentation

    def check_transform(self, transform: TransformSpec) -> TransformSpec:
        """Return a transform that can be made, and makes sense for the task's samples.

        Raises:
            ConfigurationError: It does not.
        """
        if transform and self.content != "images":
            raise ConfigurationError(
                f"found a transform for {type(self).__name__}, whose samples are {self.content}, expected none; leave "
                "transform out"
            )
        build_transforms(transform)
        return transform

    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """The classes in the order of their labels; cheap, so that a network can be built before data are read."""

    @abstractmethod
    def load(self) -> Source:
        """Read the images.

        Raises:
            DataError: They are missing or unusable.
        """

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels."""
        return self.class_names()

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classes)

    def setup(self, stage: str | None = None) -> None:
        """Read the images and split them, once; every stage needs the same.

        Raises:
            DataError: The images are missing or unusable.
        """
        self._source = self._shared.read(self._key, lambda: split_source(self._check(self.load()), *self._key[1:]))
        self._shared.latest = self._source

    def release(self) -> None:
        """Let go of the images, once neither this task nor a copy is going to be used for long; `setup` reads anew."""
        self._source = self._shared.latest = None

    @property
    def _key(self) -> tuple[int | None, float, int, int | None, int | None]:
        """All options of any task that decide what its splits are."""
        size = self.image_size if self.reads_at_size else None
        return size, self.validation_share, self.split_seed, self.max_train, self.max_test

    @property
    def splits(self) -> Source:
        """The final splits; reads the data where `setup` has not run."""
        self.setup()
        assert self._source is not None
        return self._source

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled from (seed, epoch), augmented; equally many batches on every process."""
        rank, world_size = self._process()
        # A resumed Trainer makes the iterator before it calls set_epoch, and workers start to fetch at once.
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        self.check_augmentation(self.augmentation)
        train = self.splits.train
        dataset = BatchDataset(train, self.augmentation, self.seed, self.transform)
        sampler = TrainingBatches(len(train), self.batch_size, self.seed, epoch, rank, world_size)
        return DataLoader(dataset, sampler=sampler, **self._options(train))

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]] | list[Any]:
        """The validation split; an empty list, which Lightning takes for no validation, with a share of 0."""
        validation = self.splits.validation
        return [] if validation is None else self._evaluation(validation)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The test split."""
        return self._evaluation(self.splits.test, persistent_workers=False)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """The test images without their labels."""
        return self._evaluation(self.splits.test, persistent_workers=False, collate_fn=itemgetter(0))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn the stored images of a batch into inputs, float32 [B, 3, S, S], on the device."""
        if isinstance(batch, Tensor):
            return to_input(batch, self.image_size)
        images, labels = batch
        return to_input(images, self.image_size), labels

    def calibration(self, samples: int, batch_size: int = 64, name: str | None = None) -> Calibration:
        """P unaugmented samples of the training split, drawn from ``seed`` without a look at their labels.

        A smaller P gives a prefix of a larger one. The samples are held in memory.

        Args:
            samples: P.
            batch_size: Samples a batch when iterating over the result.
            name: What the task is called, for an error.

        Raises:
            ConfigurationError: P or the batch size is below 1.
            DataError: P is larger than the training split.
        """
        at_least("the number of calibration samples", samples, 1)
        at_least("the batch size of calibration data", batch_size, 1)
        train = self.splits.train
        if samples > len(train):
            task = type(self).__name__ if name is None else f"the task '{name}' ({type(self).__name__})"
            raise DataError(
                f"{samples} calibration samples asked of {task}, whose training split has {len(train)}; ask for at "
                f"most {len(train)}: calibration.samples_per_task or a method's own in a run, --samples of coin "
                "fisher, samples_per_task of Tasks"
            )
        order = torch.randperm(len(train), generator=seeded(self.seed, Stream.CALIBRATION))
        held = self._shared.read((*self._key, self.seed, samples), train.subset(order[:samples]).held)
        return Calibration.of(held, self.image_size, batch_size)

    def _check(self, source: Source) -> Source:
        """Refuse what would fail much later and less clearly."""
        task = type(self).__name__
        for name, part in (("training", source.train), ("test", source.test), ("validation", source.validation)):
            if part is None:
                continue
            if len(part) == 0:
                raise DataError(f"{task} has no {name} {self.content}, expected at least one; check its source")
            least, most = int(part.targets.min()), int(part.targets.max())
            if least < 0 or most >= self.num_classes:
                raise DataError(
                    f"{task} has {name} labels from {least} to {most}; expected 0 to {self.num_classes - 1}; number "
                    "the classes as class_names does"
                )
            check_stored(part.images(torch.tensor([0])), self.image_size)
        return source

    def _process(self) -> tuple[int, int]:
        """Rank and number of processes."""
        trainer = self.trainer
        if trainer is None:
            return 0, 1
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigurationError(
                "coin shards its data by index, and the Trainer would shard it again; set "
                "trainer.use_distributed_sampler=false"
            )
        return trainer.global_rank, trainer.world_size

    def _evaluation(self, samples: Samples, **options: Any) -> DataLoader[Any]:
        sampler = EvaluationBatches(len(samples), self.eval_batch_size, *self._process())
        return DataLoader(BatchDataset(samples), sampler=sampler, **self._options(samples) | options)

    def _options(self, samples: Samples) -> dict[str, Any]:
        workers = self.num_workers
        if not workers and not samples.in_memory:
            processes = 1 if self.trainer is None else self.trainer.num_devices
            workers = max(1, min(WORKERS, cores() // processes))
        return {
            "batch_size": None,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # DataLoader draws a seed for its workers; from this generator instead of torch's global one.
            "generator": seeded(self.seed, Stream.WORKERS),
        }


def at_least(name: str, value: int, least: int, why: str = "") -> None:
    """Raise a `ConfigurationError` for a value that is too small."""
    if value < least:
        raise ConfigurationError(f"{name} is {value}; expected at least {least}" + (f" ({why})" if why else ""))
