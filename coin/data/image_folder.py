"""A user's own images, in one folder per class."""

import math
from hashlib import sha256
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from coin.data.samples import Source, read_splits
from coin.data.task import TaskData, once
from coin.errors import DataError

EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
IN_MEMORY = 2**30  # up to how many bytes of decoded images a task is held in memory by default
KEYED_BYTES = 256 * 2**20  # of a folder's files together that are read for an experiment's keys


class ImageFolder(TaskData):
    """Images in ``ROOT/train/CLASS/*`` and ``ROOT/test/CLASS/*``; optionally ``ROOT/val/CLASS/*`` for validation.

    The classes are the folders' names, sorted. Files with other than image extensions and hidden ones are passed over.
    Every image becomes RGB; its short side is resized to ``image_size`` and its centre cropped. If all images are
    squares of one size up to ``image_size``, they are stored as they are.

    Args:
        root: The folder.
        in_memory: Decode everything once, into 3·S² bytes an image. False decodes each batch when it is needed, always
            at ``image_size`` and in worker processes. None holds in memory what takes up to 1 GiB, all splits together.
    """

    def __init__(self, root: str, *, in_memory: bool | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.in_memory = Path(root), in_memory

    def class_names(self) -> tuple[str, ...]:
        """The names of the folders in ``ROOT/train``, sorted."""
        if len(classes := self._folders("train")) < 2:
            raise DataError(f"{self.root / 'train'} holds {len(classes)} class folder(s); expected at least 2")
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
        """A hash of the image files' names, sizes and contents, the same for a copy of the folder.

        Of contents 256 MiB are read, of every file as much from its beginning: all of a smaller data set. Pixels that
        change behind that, in a file of the same size, are not noticed.
        """

        def find() -> str:
            splits = [self._files.get(split, []) for split in ("train", "val", "test")]
            paths = [Path(path) for split in splits for path, _ in split]
            most = KEYED_BYTES // max(1, len(paths))
            digest = sha256()
            for path in paths:
                size = path.stat().st_size
                digest.update(f"{path.relative_to(self.root).as_posix()}:{size};".encode())
                with path.open("rb") as file:
                    digest.update(file.read(most))
            return digest.hexdigest()

        return once(self._shared.facts, "content", find)

    @property
    def _files(self) -> dict[str, list[tuple[str, int]]]:
        """The paths and labels of each split's images, sorted; validation is the last, if there is one."""
        splits = ["train", "test", *(["val"] if (self.root / "val").is_dir() else [])]
        return once(self._shared.facts, "files", lambda: {split: self._listed(split) for split in splits})

    def _listed(self, split: str) -> list[tuple[str, int]]:
        folder, classes, found = self.root / split, self.class_names(), self._folders(split)
        if odd := sorted({*found} ^ {*classes}):
            verb = "has" if odd[0] in found else "lacks"
            raise DataError(f"{folder} {verb} the class {odd[0]!r}, unlike train; both need the same class folders")
        files = {name: sorted((folder / name).glob("[!.]*")) for name in classes}
        images = {name: [path for path in own if path.suffix.lower() in EXTENSIONS] for name, own in files.items()}
        if empty := next((name for name in classes if not images[name]), None):
            raise DataError(f"{folder / empty} holds no images; expected files ending in {', '.join(EXTENSIONS)}")
        return [(str(path), label) for label, name in enumerate(classes) for path in images[name]]

    def _folders(self, split: str) -> tuple[str, ...]:
        def find() -> tuple[str, ...]:
            if not (folder := (self.root / split).absolute()).is_dir():
                raise DataError(f"{folder} does not exist; expected images as {folder}/CLASS/image.png; set root")
            return tuple(sorted(it.name for it in folder.iterdir() if it.is_dir() and not it.name.startswith(".")))

        return once(self._shared.facts, split, find)
