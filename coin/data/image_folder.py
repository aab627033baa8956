"""A user's own images, in one folder per class."""

from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from torchvision import datasets

from coin.data.image_io import read, square_in, stored_side
from coin.data.samples import Source
from coin.data.task import TaskData
from coin.errors import DataError

KEYED_BYTES = 256 * 2**20  # of a split's files together that are read for an experiment's keys


class ImageFolder(TaskData):
    """Images in ``ROOT/train/CLASS/*`` and ``ROOT/test/CLASS/*``; optionally ``ROOT/val/CLASS/*`` for validation.

    The classes are the folders' names, sorted. Files without an image's extension (torchvision's) are ignored.
    Every image becomes RGB; its short side is resized to ``image_size`` and its centre cropped. If all images are
    squares of one size up to ``image_size``, they are stored as they are. All are held in memory, 3·S² bytes each.

    Args:
        root: The folder.
    """

    without_effect = TaskData.without_effect | {"root"}

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the folders in ``ROOT/train``, sorted."""
        return tuple(self.files()["train"].classes)

    def files(self) -> dict[str, Any]:
        """Train, test and, if there is one, val, as torchvision's `ImageFolder`; no image is read.

        A DataError where a split is missing or lacks a class, or a class has no images.
        """
        return self.once("files", self._list_files)

    def _list_files(self) -> dict[str, Any]:
        splits = ["train", "test"]
        if (self.root / "val").is_dir():
            splits.append("val")
        found: dict[str, Any] = {}
        for split in splits:
            folder = self.root.absolute() / split
            try:
                found[split] = datasets.ImageFolder(folder)
            except OSError as error:
                raise DataError(
                    f"{error}; expected images as {folder}/CLASS/image.png; set root"
                ) from error
            odd = set(found[split].classes) ^ set(found["train"].classes)
            if odd:
                raise DataError(
                    f"{folder} and train do not both have the class folder {min(odd)!r}; both need the same"
                )
        return found

    def load(self) -> Source:
        """Decode the images of all splits."""
        splits = self.files().values()
        paths = [path for images in splits for path, _ in images.samples]
        side = stored_side(paths, self.image_size)
        for images in splits:
            images.loader = partial(square_in, side=side)
        return Source(*map(read, splits))

    def content_key(self) -> dict[str, str]:
        """A hash of each split's names, sizes and contents of image files, the same for a copy of the folder.

        At most 256 MiB of a split are read, the same number of bytes from the beginning of each file. A change after
        these bytes that leaves a file's size as it was is not noticed.
        """
        return self.once("content", self._hash_files)

    def _hash_files(self) -> dict[str, str]:
        hashes = {}
        for split, images in self.files().items():
            digest = sha256()
            for place, _ in images.samples:
                path = Path(place)
                name = path.relative_to(images.root).as_posix()
                digest.update(f"{name}:{path.stat().st_size};".encode())
                with path.open("rb") as file:
                    digest.update(file.read(KEYED_BYTES // len(images)))
            hashes[split] = digest.hexdigest()
        return hashes
