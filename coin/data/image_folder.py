"""A user's own images, in one folder per class."""

import math
from hashlib import sha256
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from coin.data.samples import Source, read_splits
from coin.data.task import TaskData
from coin.errors import DataError

EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
IN_MEMORY = 2**30  # up to how many bytes of decoded images a task is held in memory by default
KEYED_BYTES = 256 * 2**20  # of a split's files together that are read for an experiment's keys


class ImageFolder(TaskData):
    """Images in ``ROOT/train/CLASS/*`` and ``ROOT/test/CLASS/*``; optionally ``ROOT/val/CLASS/*`` for validation.

    The classes are the folders' names, sorted. Hidden files, and files without an image's extension, are ignored.
    Every image becomes RGB; its short side is resized to ``image_size`` and its centre cropped. If all images are
    squares of one size up to ``image_size``, they are stored as they are.

    Args:
        root: The folder.
        in_memory: Decode everything once, into 3·S² bytes an image. False decodes each batch when it is needed, always
            at ``image_size`` and in worker processes. None holds in memory what takes up to 1 GiB, all splits together.
    """

    without_effect = TaskData.without_effect | {"root"}

    def __init__(self, root: str, *, in_memory: bool | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.in_memory = in_memory

    def class_names(self) -> tuple[str, ...]:
        """The names of the folders in ``ROOT/train``, sorted."""
        return self.once("classes", lambda: _class_folders(self.root / "train"))

    def check_files(self) -> None:
        """Refuse splits that are missing, that lack a class, or a class without images; no image is read."""
        self.files()

    def files(self) -> dict[str, list[tuple[str, int]]]:
        """The paths and labels of each split's images, sorted; validation is the last, if there is one."""
        return self.once("files", self._list_files)

    def _list_files(self) -> dict[str, list[tuple[str, int]]]:
        splits = ["train", "test"]
        if (self.root / "val").is_dir():
            splits.append("val")
        classes = self.class_names()
        return {split: _images_in(self.root / split, classes) for split in splits}

    def load(self) -> Source:
        """Find and, where they are held in memory, decode the images of all splits."""
        most: float = IN_MEMORY
        if self.in_memory is not None:
            most = math.inf if self.in_memory else 0
        splits = list(self.files().values())
        train, test, *validation = read_splits(splits, self.image_size, most)
        return Source(train, test, *validation)

    def content_key(self) -> dict[str, str]:
        """A hash of each split's names, sizes and contents of image files, the same for a copy of the folder.

        At most 256 MiB of a split are read, the same number of bytes from the beginning of each file. A change after
        these bytes that leaves a file's size as it was is not noticed.
        """
        return self.once(
            "content", lambda: {split: self._hash_files(split) for split in self.files()}
        )

    def _hash_files(self, split: str) -> str:
        paths = [Path(path) for path, _ in self.files()[split]]
        most = KEYED_BYTES // len(paths)
        digest = sha256()
        for path in paths:
            name = path.relative_to(self.root).as_posix()
            size = path.stat().st_size
            digest.update(f"{name}:{size};".encode())
            with path.open("rb") as file:
                digest.update(file.read(most))
        return digest.hexdigest()


def _class_folders(folder: Path) -> tuple[str, ...]:
    """Return the names of a split's visible folders, sorted; a DataError for fewer than two."""
    if not folder.is_dir():
        place = folder.absolute()
        raise DataError(
            f"{place} does not exist; expected images as {place}/CLASS/image.png; set root"
        )
    folders = [each for each in folder.iterdir() if each.is_dir()]
    names = sorted(each.name for each in folders if not each.name.startswith("."))
    if len(names) < 2:
        raise DataError(f"{folder} holds {len(names)} class folder(s); expected at least 2")
    return tuple(names)


def _images_in(folder: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """Return the paths and labels of a split's images; a DataError for other class folders, or one without images."""
    found = _class_folders(folder)
    if found != classes:
        odd = sorted(set(found) ^ set(classes))
        raise DataError(
            f"{folder} and train do not both have the class folder {odd[0]!r}; both need the same"
        )
    images = []
    for label, name in enumerate(classes):
        files = sorted((folder / name).glob("[!.]*"))
        paths = [path for path in files if path.suffix.lower() in EXTENSIONS]
        if not paths:
            raise DataError(
                f"{folder / name} holds no images; expected files ending in {', '.join(EXTENSIONS)}"
            )
        images += [(str(path), label) for path in paths]
    return images
