"""A user's own images, in one folder per class."""

import hashlib
import math
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from coin.data.samples import Source, read_splits
from coin.data.task import TaskData, once
from coin.errors import DataError

EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
IN_MEMORY = 2**30  # up to how many bytes of decoded images a task is held in memory by default


class ImageFolder(TaskData):
    """Images in ``ROOT/train/CLASS/*`` and ``ROOT/test/CLASS/*``; optionally ``ROOT/val/CLASS/*`` for validation.

    The classes are the folders' names, sorted. Files with other than image extensions and hidden ones are passed over.
    Every image becomes RGB; its short side is resized to ``image_size`` and its centre cropped. If all images are
    squares of one size up to ``image_size``, they are stored as they are.

    Args:
        root: The folder.
        in_memory: Decode everything once, into 3·S² bytes an image. False decodes each batch when it is needed, always
            at ``image_size`` and in worker processes. None holds in memory what takes up to 1 GiB, all splits together.
        kwargs: See `TaskData`.
    """

    def __init__(self, root: str, *, in_memory: bool | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.in_memory = Path(root), in_memory

    def class_names(self) -> tuple[str, ...]:
        """The names of the folders in ``ROOT/train``, sorted."""
        classes, train = self._folders("train"), self.root / "train"
        if len(classes) < 2:
            found = f"{train} holds {len(classes)} class folder(s)"
            raise DataError(f"{found}; expected at least 2, as in {train}/CLASS/image.png")
        return classes

    def check_files(self) -> None:
        """Refuse splits that are missing, that lack a class, or a class without images; no image is read."""
        _ = self._files

    def load(self) -> Source:
        """Find and, where they are held in memory, decode the images of all splits."""
        most = {None: IN_MEMORY, True: math.inf, False: 0}[self.in_memory]
        train, test, *validation = read_splits(list(self._files.values()), self.image_size, most)
        return Source(train, test, *validation)

    def content_key(self) -> str:
        """A hash of the image files' names, sizes and times: an experiment notices when the folder has changed."""
        return once(self._shared.facts, "content", self._hash)

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for split in sorted(self._files, key=("train", "val", "test").index):
            for path in (Path(path) for path, _ in self._files[split]):
                place, state = path.relative_to(self.root).as_posix(), path.stat()
                digest.update(f"{place}:{state.st_size}:{state.st_mtime_ns};".encode())
        return digest.hexdigest()

    @property
    def _files(self) -> dict[str, list[tuple[str, int]]]:
        """The paths and labels of each split's images, sorted; validation is the last, if there is one."""
        splits = ["train", "test", *(["val"] if (self.root / "val").is_dir() else [])]
        return once(self._shared.facts, "files", lambda: {split: self._listed(split) for split in splits})

    def _listed(self, split: str) -> list[tuple[str, int]]:
        folder, classes = self.root / split, self.class_names()
        found = self._folders(split)
        if odd := sorted({*found} ^ {*classes}):
            verb = "has" if odd[0] in found else "lacks"
            told = f"{folder} {verb} the class {odd[0]!r}, unlike {self.root / 'train'}"
            raise DataError(f"{told}; both need the same class folders")
        images = {name: [path for path in sorted((folder / name).iterdir()) if _is_image(path)] for name in classes}
        if empty := next((name for name in classes if not images[name]), None):
            raise DataError(f"{folder / empty} holds no images; expected files ending in {', '.join(EXTENSIONS)}")
        return [(str(path), label) for label, name in enumerate(classes) for path in images[name]]

    def _folders(self, split: str) -> tuple[str, ...]:
        return once(self._shared.facts, split, lambda: _class_folders((self.root / split).absolute()))


def _class_folders(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        expected = f"expected images as {folder}/CLASS/image.png; set root to the right folder"
        raise DataError(f"{folder} does not exist; {expected}")
    return tuple(sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
