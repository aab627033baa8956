"""A user's own images, in one folder per class."""

import hashlib
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from coin.data.image_io import read_files
from coin.data.samples import Samples, Source
from coin.data.task import TaskData, once
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
        in_memory: Decode everything once, into 3·S² bytes an image. False, for folders that do not fit into memory,
            decodes each batch when it is needed, always at ``image_size`` and in worker processes (see
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
            train = self.root / "train"
            raise DataError(
                f"{train} holds {len(classes)} class folder(s); expected at least 2, as in {train}/CLASS/image.png"
            )
        return classes

    def check_files(self) -> None:
        """Refuse splits that are missing, that lack a class, or a class without images; no image is read."""
        super().check_files()
        for split in self._splits:
            self._checked(split)

    def load(self) -> Source:
        """Find and, where they are held in memory, decode the images of all splits."""
        paths: list[str] = []
        labels: list[int] = []
        ends = [0]
        for split in self._splits:
            for label, (name, images) in enumerate(self._checked(split).items()):
                paths += [str(self.root / split / name / image) for image in images]
                labels += [label] * len(images)
            ends.append(len(paths))
        most = {None: IN_MEMORY, True: math.inf, False: 0}[self.in_memory]
        everything = Samples.of(read_files(paths, self.image_size, most), torch.tensor(labels))
        return Source(*(everything.subset(range(*part)) for part in pairwise(ends)))

    def content_key(self) -> str:
        """A hash of the image files' names, sizes and times: an experiment notices when the folder has changed."""
        return once(self._shared.facts, "content", self._hash)

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
                f"{folder} does not exist; expected images as {folder}/CLASS/image.png; set root to the right folder"
            )
        return self._listing[split]

    def _checked(self, split: str) -> dict[str, list[str]]:
        """The same, of a split that has the classes of the training split and images of each."""
        files, folder = self._files(split), self.root / split
        if odd := sorted(set(files) ^ set(self.class_names())):
            verb = "has" if odd[0] in files else "lacks"
            raise DataError(
                f"{folder} {verb} the class {odd[0]!r}, unlike {self.root / 'train'}; both need the same class folders"
            )
        if empty := next((name for name, images in files.items() if not images), None):
            raise DataError(f"{folder / empty} holds no images; expected files ending in {', '.join(EXTENSIONS)}")
        return files

    @property
    def _splits(self) -> tuple[str, ...]:
        """The splits that it needs, and validation if there is one."""
        return "train", "test", *({"val"} & self._listing.keys())

    @property
    def _listing(self) -> dict[str, dict[str, list[str]]]:
        """The names of the images of each class, both sorted, of each split that there is."""
        return once(self._shared.facts, "listing", lambda: _listed(self.root))


def _listed(root: Path) -> dict[str, dict[str, list[str]]]:
    splits = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    return {
        split: {name: _images(folder / name) for name in _visible(folder) if (folder / name).is_dir()}
        for split, folder in splits.items()
    }


def _images(folder: Path) -> list[str]:
    return [name for name in _visible(folder) if name.lower().endswith(EXTENSIONS)]


def _visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
