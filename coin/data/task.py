"""What all tasks have in common: options, splits, loaders and calibration data."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar
from weakref import WeakValueDictionary

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from coin.core.choices import check_integer, check_number, is_list_of_names, parse_enum
from coin.core.processes import cores
from coin.data.samples import BatchDataset, Calibration, Samples, Source, split_source
from coin.data.sampling import Stream, batch_loader, seeded
from coin.data.transform import Augmentation, TransformSpec, build_transforms, check_stored, to_input
from coin.errors import ConfigurationError, DataError
from coin.files.yaml import read_yaml

T = TypeVar("T")

WORKERS = 8  # at most so many processes decode images that are not held in memory, by default

# Of the options that are whole numbers; BatchNorm cannot train on one sample.
_LEAST = dict.fromkeys(("image_size", "eval_batch_size", "max_test"), 1)
_LEAST |= dict.fromkeys(("batch_size", "max_train"), 2) | dict.fromkeys(("split_seed", "seed", "num_workers"), 0)


class Shared:
    """What all copies of a task in one process share: the samples that were read, and facts about its files."""

    def __init__(self) -> None:
        self.latest: object = None  # what was read last, which keeps it in `samples` as long as there is a copy
        self.facts: dict[Hashable, Any] = {}
        self.samples: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


def once(cache: MutableMapping[Hashable, Any], key: Hashable, find: Callable[[], T]) -> T:
    """Return what a cache has for a key, found first if it has nothing."""
    found: T | None = cache.get(key)
    if found is None:
        found = cache[key] = find()
    return found


def read_head(given: Any) -> dict[str, Any] | None:
    """Return ``{zero_shot: {prompts: [...], classes: [...]}}``, of which a file may hold the inner part.

    ``{}`` in a prompt stands for the class; without classes it is the task's own names, with spaces for underscores.
    """
    if given is None:
        return None
    section = given.get("zero_shot") if isinstance(given, Mapping) else None
    if isinstance(section, str):
        section = read_yaml(Path(section))
    found = dict(section) if isinstance(section, Mapping) else {}
    prompts, classes = found.pop("prompts", None), found.pop("classes", None)
    sound = is_list_of_names(prompts) and all("{}" in prompt for prompt in prompts)
    if found or not sound or not (classes is None or (is_list_of_names(classes) and len({*classes}) == len(classes))):
        expected = "{zero_shot: {prompts: ['a photo of a {}.'], classes: [...]}}, of distinct names, or a file"
        raise ConfigurationError(f"found head {section or given!r:.200}, expected {expected}")
    return {"zero_shot": {"prompts": list(prompts), "classes": None if classes is None else list(classes)}}


class TaskData(LightningDataModule, ABC):
    """One task: images with their classes, or texts, whose tokens, int64 [B, L], stand in the place of images.

    The loaders yield stored images, uint8 [B, C, H, W], and labels, int64 [B]; `on_after_batch_transfer` turns the
    images into inputs on the device. Samples are sharded over processes by index: set the Trainer's
    ``use_distributed_sampler=False``. A subclass gives the classes, in the order of their labels (`names`, or
    `class_names` where finding them takes time), and reads the images (`load`), or texts if its `content` is ``texts``.
    Copies by `coin.data.tasks.task_with` share what is read.

    Args:
        image_size: Side of the networks' inputs in pixels; for texts, their number of tokens.
        batch_size: Training samples a batch and process, at least 2.
        eval_batch_size: Samples a batch in validation, test and prediction.
        validation_share: Share of the training samples for validation, in [0, 1), where the source has no such split.
        split_seed: Decides which samples are in which split.
        seed: Decides the training samples' order and augmentation, and the calibration samples. None is 0, or
            ``--seed_everything`` on the command line.
        augmentation: The augmentation of training images.
        transform: A transform after it, such as ``{class_path: torchvision.transforms.v2.RandomResizedCrop, init_args:
            {size: 32}}``, or a list of them, from one image, uint8 [1 or 3, H, W], to one, all of one size. What it
            draws is a function of the seed, the epoch and the image.
        max_train: The largest number of training samples, a stratified choice; validation shrinks in proportion.
        max_test: The largest number of test samples, a stratified choice.
        num_workers: Worker processes of each loader; with 0 only files that are decoded batch by batch have workers,
            one a core, 8 at most.
        head: A CLIP's zero-shot head, ``{zero_shot: {prompts: ['a photo of a {}.'], classes: [...]}}`` or
            ``{zero_shot: FILE.yaml}`` (`read_head`). The classes, in the order of the labels, become the task's names.
            None is for heads that are trained.
    """

    names: tuple[str, ...]
    content: ClassVar[str] = "images"  # what networks read of it: images or texts

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
        head: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.image_size, self.batch_size, self.eval_batch_size = image_size, batch_size, eval_batch_size
        self.validation_share, self.split_seed, self.seed = validation_share, split_seed, seed or 0
        self.max_train, self.max_test, self.num_workers = max_train, max_test, num_workers
        for name, least in _LEAST.items():
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least)
        check_number("validation_share", validation_share, low=0.0, high=1.0)
        self.augmentation, self.transform = parse_enum(Augmentation, "augmentation", augmentation), transform
        self.check_augmentation(self.augmentation, transform)
        build_transforms(transform)  # refuses what cannot be made
        self.head = read_head(head)
        self._shared = Shared()
        self._source: Source | None = None

    def check_augmentation(self, augmentation: Augmentation, transform: TransformSpec = None) -> None:
        """Refuse an augmentation or a transform of what are no images."""
        if self.content != "images" and (transform or augmentation is not Augmentation.none):
            found, own = "a transform" if transform else f"augmentation '{augmentation}'", type(self).__name__
            raise ConfigurationError(f"found {found} for {own}, whose samples are {self.content}, expected none")

    def class_names(self) -> tuple[str, ...]:
        """The classes in the order of their labels; a network is built with them before data are read."""
        if not hasattr(self, "names"):
            raise DataError(f"found no names in {type(self).__name__}, expected its classes'; set names = (…)")
        return self.names

    @abstractmethod
    def load(self) -> Source:
        """Read the images; a `DataError` if they are missing or unusable."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels; with a zero-shot head those in its prompts."""
        own = None if self.head is None else self.head["zero_shot"]["classes"]
        return self.class_names() if own is None else tuple(own)

    @property
    def zero_shot(self) -> tuple[list[str], list[str]] | None:
        """The prompts and class names of a zero-shot head; None where the head is trained."""
        if self.head is None:
            return None
        section = self.head["zero_shot"]
        return section["prompts"], section["classes"] or [name.replace("_", " ") for name in self.class_names()]

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
        _ = self.num_classes

    def setup(self, stage: str | None = None) -> None:
        """Read the images and split them, once."""
        _ = self.splits

    def release(self) -> None:
        """Free the images; `setup` reads them again."""
        self._source = self._shared.latest = None

    @property
    def _key(self) -> tuple[Any, ...]:
        return self.image_size, self.validation_share, self.split_seed, self.max_train, self.max_test

    def _read(self) -> Source:
        """Read and split the images; refuse what would fail much later and less clearly."""
        source, task = self.load(), type(self).__name__
        if not isinstance(source, Source):
            raise DataError(f"{task}.load() returned a {type(source).__name__}, expected a coin.data.Source; mend it")
        if (own := len(self.class_names())) != self.num_classes:
            raise DataError(f"{task} has {own} classes, head.zero_shot.classes {self.num_classes}; name each once")
        if own < 2:
            raise DataError(f"{task} has {own} class, expected at least two to tell apart; add another")
        for name, part in (("training", source.train), ("test", source.test), ("validation", source.validation)):
            if part is None:
                continue
            if not len(part):
                raise DataError(f"{task} has no {name} {self.content}, expected at least one; check its source")
            least, most = map(int, part.targets.aminmax())
            if least < 0 or most >= self.num_classes:
                raise DataError(f"{task} has {name} labels {least} to {most}; expected 0 to {self.num_classes - 1}")
            check_stored(part.images(torch.tensor([0])), self.image_size)
        return split_source(source, self.validation_share, self.split_seed, self.max_train, self.max_test)

    @property
    def splits(self) -> Source:
        """The final splits, read once."""
        self._source = self._shared.latest = found = once(self._shared.samples, self._key, self._read)
        return found

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled from (seed, epoch), augmented; equally many batches on every process."""
        self.check_augmentation(self.augmentation, self.transform)
        return self._loader(self.splits.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]] | list[Any]:
        """The validation split; an empty list, which Lightning takes for no validation, with a share of 0."""
        validation = self.splits.validation
        return [] if validation is None else self._loader(validation)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The test split."""
        return self._loader(self.splits.test, persistent_workers=False)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """The test images without their labels."""
        return self._loader(self.splits.test, persistent_workers=False, collate_fn=itemgetter(0))

    def _loader(self, samples: Samples, batch_size: int | None = None, **options: Any) -> DataLoader[Any]:
        dataset = BatchDataset(samples, self.augmentation, self.seed, build_transforms(self.transform))
        workers = self.num_workers
        if not workers and not isinstance(samples.store, Tensor):
            processes = 1 if self.trainer is None else self.trainer.num_devices
            workers = max(1, min(WORKERS, cores() // processes))
        usual = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}
        return batch_loader(dataset, batch_size or self.eval_batch_size, self.seed, self.trainer, **usual | options)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn the stored images of a batch into inputs, float32 [B, 3, S, S], on the device."""
        if isinstance(batch, Tensor):
            return to_input(batch, self.image_size)
        images, labels = batch
        return to_input(images, self.image_size), labels

    def calibration(self, samples: int, batch_size: int = 64, name: str | None = None) -> Calibration:
        """P unaugmented training samples, drawn from ``seed`` without their labels; fewer are a prefix of more."""
        return self._drawn("training", Stream.CALIBRATION, samples, batch_size, name)

    def promise(self, samples: int, batch_size: int = 64, name: str | None = None) -> Calibration:
        """So many samples of the validation split, which experts were not trained on, drawn as `calibration` draws."""
        return self._drawn("validation", Stream.PROMISE, samples, batch_size, name)

    def _drawn(self, split: str, stream: Stream, samples: int, batch_size: int, name: str | None) -> Calibration:
        use, option = stream.name.lower(), "samples_per_task" if split == "training" else "promise_samples"
        check_integer(f"{use} samples", samples, 1)
        check_integer(f"the {use} samples' batch size", batch_size, 1)
        part = self.splits.train if split == "training" else self.splits.validation
        if part is None or samples > len(part):
            task, most = type(self).__name__, 0 if part is None else len(part)
            told = f"{samples} {use} samples asked of {f'the task {name!r} ({task})' if name else task}, whose {split}"
            raise DataError(f"{told} split has {most}; set {option} to {most} or less, or change validation_share")
        order = torch.randperm(len(part), generator=seeded(self.seed, stream))
        key = *self._key, self.seed, samples, stream
        held = once(self._shared.samples, key, part.subset(order[:samples]).held)
        return Calibration.of(held, self.image_size, batch_size)
