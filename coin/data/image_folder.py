"""A user's own images, in one folder per class."""

import hashlib
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from coin.data.decoding import read_files
from coin.data.samples import Samples, Source
from coin.data.task import TaskData
from coin.errors import DataError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

IN_MEMORY = 2**30  # up to how many bytes of decoded images a folder is held in memory, unless it is said


class ImageFolder(TaskData):
    """Images in ``ROOT/train/CLASS/*`` and ``ROOT/test/CLASS/*``; optionally ``ROOT/val/CLASS/*`` for validation.

    The classes are the folders' names, sorted. Files with other than image extensions and hidden files are passed
    over. Every image becomes RGB; its short side is resized to ``image_size`` and its centre cropped. If all images
    are squares of one size that is not above ``image_size``, they are stored as they are. The folder is listed once for
    a task and its copies: a task that is made anew sees what has been added.

    Args:
        root: The folder.
        in_memory: Decode everything once, into 3·S² bytes an image. False decodes each batch when it is needed, for
            folders that do not fit into memory: always at ``image_size``, and in worker processes (see
            ``num_workers``). None holds in memory what takes up to 1 GiB, all splits together.
        kwargs: See `TaskData`.
    """

    def __init__(self, root: str, *, in_memory: bool | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.in_memory = in_memory

    def class_names(self) -> tuple[str, ...]:
        """The names of the folders in ``ROOT/train``, sorted."""
        classes = tuple(self._files("train"))
        if len(classes) < 2:
            raise DataError(
                f"{self.root / 'train'} holds {len(classes)} class folder(s); expected at least 2, as in "
                f"{self.root / 'train' / 'CLASS' / 'image.png'}"
            )
        return classes

    def load(self) -> Source:
        """Find and, where they are held in memory, decode the images of all splits."""
        paths: list[str] = []
        labels: list[int] = []
        ends = [0]
        for split in ("train", "test", "val"):
            if split == "val" and split not in self._listing:
                continue
            files = self._files(split)
            self._check_classes(split, files)
            for label, (name, images) in enumerate(files.items()):
                paths += [str(self.root / split / name / image) for image in images]
                labels += [label] * len(images)
            ends.append(len(paths))
        most = {None: IN_MEMORY, True: math.inf, False: 0}[self.in_memory]
        everything = Samples.of(read_files(paths, self.image_size, most), torch.tensor(labels))
        return Source(*(everything.subset(range(*part)) for part in pairwise(ends)))

    def content_key(self) -> str:
        """A hash of the image files' names, sizes and times: an experiment notices when the folder has changed."""
        return self._shared.fact("content", self._hash)

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for split, classes in self._listing.items():
            for place in (f"{split}/{name}/{file}" for name, files in classes.items() for file in files):
                state = (self.root / place).stat()
                digest.update(f"{place}:{state.st_size}:{state.st_mtime_ns};".encode())
        return digest.hexdigest()

    def _files(self, split: str) -> dict[str, list[str]]:
        """The images of each class in a split."""
        if split not in self._listing:
            folder = (self.root / split).absolute()
            raise DataError(
                f"{folder} does not exist; expected images as {folder / 'CLASS' / 'image.png'}; set root to the right "
                "folder"
            )
        return self._listing[split]

    def _check_classes(self, split: str, files: dict[str, list[str]]) -> None:
        if odd := sorted(set(files) ^ set(self.class_names())):
            verb = "has" if odd[0] in files else "lacks"
            raise DataError(
                f"{self.root / split} {verb} the class {odd[0]!r}, unlike {self.root / 'train'}; both need the same "
                "class folders"
            )
        if empty := next((name for name, images in files.items() if not images), None):
            raise DataError(
                f"{self.root / split / empty} holds no images; expected files ending in {', '.join(EXTENSIONS)}"
            )

    @property
    def _listing(self) -> dict[str, dict[str, list[str]]]:
        return self._shared.fact("listing", lambda: list_images(self.root))


def list_images(root: Path) -> dict[str, dict[str, list[str]]]:
    """The names of the images of each class, both sorted, of each split that there is."""
    return {
        split: {folder.name: _images(folder.path) for folder in _visible(root / split) if folder.is_dir()}
        for split in ("train", "val", "test")
        if (root / split).is_dir()
    }


def _images(folder: str) -> list[str]:
    return [entry.name for entry in _visible(folder) if entry.name.lower().endswith(EXTENSIONS) and entry.is_file()]


def _visible(folder: str | Path) -> list["os.DirEntry[str]"]:
    """What a folder holds that is not hidden, sorted by name."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
