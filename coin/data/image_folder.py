"""A user's own images, in one folder per class."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from coin.data.decoding import LazyImages, read_files
from coin.data.samples import ImageStore, Samples
from coin.data.source import Source
from coin.data.task import TaskData
from coin.errors import DataError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder(TaskData):
    """Images in ``ROOT/train/CLASS/*`` and ``ROOT/test/CLASS/*``; optionally ``ROOT/val/CLASS/*`` for validation.

    The classes are the folders' names, sorted. Files with other than image extensions and hidden files are passed
    over. Every image becomes RGB; its short side is resized to ``image_size`` and its centre cropped. If all images
    are squares of one size that is not above ``image_size``, they are stored as they are.

    Args:
        root: The folder.
        in_memory: Decode everything once, into 3·S² bytes an image. False decodes each batch when it is needed, for
            folders that do not fit into memory; always at ``image_size``.
        kwargs: See `TaskData`.
    """

    def __init__(self, root: str, *, in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.in_memory = in_memory
        self._classes: tuple[str, ...] | None = None

    def class_names(self) -> tuple[str, ...]:
        """The names of the folders in ``ROOT/train``, sorted.

        Raises:
            DataError: The folder or its ``train`` is missing, or holds fewer than two classes.
        """
        if self._classes is None:
            if not self.root.is_dir():
                raise DataError(f"the image folder {self.root.absolute()} does not exist; set root to the right one")
            self._classes = self._folders("train")
            if len(self._classes) < 2:
                raise DataError(
                    f"{self.root / 'train'} holds {len(self._classes)} class folder(s); expected at least 2, as in "
                    f"{self.root / 'train' / 'CLASS' / 'image.png'}"
                )
        return self._classes

    def load(self) -> Source:
        """Find and (with ``in_memory``) decode the images of all splits.

        Raises:
            DataError: A split is missing, its classes differ from those of ``train``, a class is empty, or an image
                cannot be read.
        """
        splits = ["train", "test"] + (["val"] if (self.root / "val").is_dir() else [])
        paths: list[Path] = []
        labels: list[int] = []
        ends = []
        for split in splits:
            for label, files in enumerate(self._files(split)):
                paths += files
                labels += [label] * len(files)
            ends.append(len(paths))
        store: ImageStore
        store = read_files(paths, self.image_size) if self.in_memory else LazyImages(tuple(paths), self.image_size)
        everything = Samples.of(store, torch.tensor(labels))
        train, test, *validation = (
            everything.subset(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)
        )
        return Source(train, test, validation[0] if validation else None)

    def content_key(self) -> str:
        """A hash of the image files' names, sizes and times: an experiment notices when the folder has changed."""
        digest = hashlib.sha256()
        for split in ("train", "val", "test"):
            for path in sorted((self.root / split).glob("*/*")):
                try:
                    state = path.stat()
                except OSError:  # a link to nowhere, which is no image
                    continue
                digest.update(f"{path.relative_to(self.root)}:{state.st_size}:{state.st_mtime_ns};".encode())
        return digest.hexdigest()

    def _files(self, split: str) -> list[list[Path]]:
        """The image files of each class in a split."""
        classes, found = set(self.class_names()), set(self._folders(split))
        if found - classes:
            raise DataError(
                f"{self.root / split} has the class {min(found - classes)!r}, which {self.root / 'train'} lacks; "
                "both need the same class folders"
            )
        if classes - found:
            raise DataError(
                f"{self.root / split} lacks the class {min(classes - found)!r} of {self.root / 'train'}; "
                "both need the same class folders"
            )
        files = []
        for name in self.class_names():
            folder = self.root / split / name
            images = sorted(
                path
                for path in folder.iterdir()
                if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
            )
            if not images:
                raise DataError(f"{folder} holds no images; expected files ending in {', '.join(EXTENSIONS)}")
            files.append(images)
        return files

    def _folders(self, split: str) -> tuple[str, ...]:
        folder = self.root / split
        if not folder.is_dir():
            raise DataError(f"{folder} does not exist; expected images as {folder / 'CLASS' / 'image.png'}")
        return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
