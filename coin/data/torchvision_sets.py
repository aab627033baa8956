"""Tasks from torchvision's data sets, with their checksummed download."""

import string
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision import datasets

from coin.data.image_folder import IN_MEMORY
from coin.data.samples import Samples, Source, hold_out, read_splits
from coin.data.task import TaskData, unusable_files

_BY_SPLIT = ({"split": "train"}, {"split": "test"})
_VALIDATED = ({"split": "train"}, {"split": "val"}, {"split": "test"})
_LETTERS = ({"split": "letters", "train": True}, {"split": "letters", "train": False})
_CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_CIFAR100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard "
    "lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
    "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark "
    "shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone "
    "television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)


class TorchvisionTask(TaskData):
    """A task that torchvision downloads and reads.

    Args:
        root: The folder for downloaded data, shared by all sets.
        download: Download what is missing. False is for machines without network: errors name the place of the files.
    """

    without_effect = TaskData.without_effect | {"root", "download"}
    folder: ClassVar[str]  # where torchvision keeps the files, under root
    # Torchvision's arguments beside root and download: of the training, any validation, the test split.
    arguments: ClassVar[tuple[dict[str, Any], ...]] = ({"train": True}, {"train": False})

    def __init__(self, *, root: str = "data", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.download = download

    def prepare_data(self) -> None:
        """Download what is missing, if ``download`` is set; a `DataError` if that fails."""
        if self.download:
            self.once("downloaded", lambda: self._open(download=True))

    def check_files(self) -> None:
        """Refuse files that cannot be read and are not to be downloaded."""
        if not self.download:
            self._open(download=False)

    def load(self) -> Source:
        """Read the downloaded files."""
        train, test = self._open(download=False)
        train_images, train_labels = self.tensors(train)
        test_images, test_labels = self.tensors(test)
        return Source(Samples.of(train_images, train_labels), Samples.of(test_images, test_labels))

    def tensors(self, dataset: Any) -> tuple[Tensor, Tensor]:
        """The images, uint8 [P, C, H, W], and labels, int64 [P], of an opened data set."""
        images = torch.as_tensor(dataset.data)
        if images.ndim == 3:  # grey
            images = images.unsqueeze(1)
        if images.shape[3] == 3:
            images = images.permute(0, 3, 1, 2)
        labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
        return images.contiguous(), torch.as_tensor(labels)

    def _open(self, download: bool) -> list[Any]:
        name = type(self).__name__
        kind = getattr(datasets, name.removesuffix("Letters"))
        try:
            return [kind(self.root, download=download, **arguments) for arguments in self.arguments]
        # From AssertionError to BadZipFile, whatever torchvision and urllib raise.
        except Exception as error:
            raise unusable_files(name, self.root / self.folder, download, error) from error


class MNIST(TorchvisionTask):
    """Handwritten digits, 28×28 grey; 60,000 and 10,000 images."""

    folder = "MNIST/raw"
    names = tuple(string.digits)


class FashionMNIST(TorchvisionTask):
    """Articles of clothing, 28×28 grey; 60,000 and 10,000 images."""

    folder = "FashionMNIST/raw"
    names = tuple(datasets.FashionMNIST.classes)


class KMNIST(TorchvisionTask):
    """Cursive Japanese characters, 28×28 grey; 60,000 and 10,000 images."""

    folder = "KMNIST/raw"
    names = tuple(datasets.KMNIST.classes)


class EMNISTLetters(TorchvisionTask):
    """Handwritten letters, both cases in one class, 28×28 grey; 124,800 and 20,800 images."""

    folder = "EMNIST/raw"
    names = tuple(string.ascii_lowercase)
    arguments = _LETTERS

    def tensors(self, dataset: Any) -> tuple[Tensor, Tensor]:
        """The letters upright (EMNIST stores them transposed) and labelled from 0 (EMNIST counts from 1)."""
        images = dataset.data.transpose(1, 2).unsqueeze(1)
        return images.contiguous(), dataset.targets - 1


class CIFAR10(TorchvisionTask):
    """Photographs of things and animals, 32×32 RGB; 50,000 and 10,000 images."""

    folder = "cifar-10-batches-py"
    names = _CIFAR10


class CIFAR100(TorchvisionTask):
    """Photographs in 100 classes, 32×32 RGB; 50,000 and 10,000 images."""

    folder = "cifar-100-python"
    names = tuple(_CIFAR100.split())


class SVHN(TorchvisionTask):
    """House numbers' digits from photographs, 32×32 RGB; 73,257 and 26,032 images."""

    folder = ""
    names = tuple(string.digits)
    arguments = _BY_SPLIT


class STL10(TorchvisionTask):
    """Photographs of things and animals, 96×96 RGB; 5,000 and 8,000 labelled images."""

    folder = "stl10_binary"
    names = _STL10
    arguments = _BY_SPLIT


class ImageFiles(TorchvisionTask):
    """A set of image files, which are read like those of an `ImageFolder`."""

    def files(self, dataset: Any) -> list[tuple[str, int]]:
        """The paths and labels of an opened data set."""
        if hasattr(dataset, "_image_files"):
            return [
                (str(path), label)
                for path, label in zip(dataset._image_files, dataset._labels, strict=True)
            ]
        samples = dataset._samples if hasattr(dataset, "_samples") else dataset.samples
        return [(str(path), label) for path, label in samples]

    def load(self) -> Source:
        """Find and, where they are held in memory, decode the images of all splits."""
        splits = [sorted(self.files(split)) for split in self._open(download=False)]
        train, *others = read_splits(splits, self.image_size, IN_MEMORY)
        if not others:
            return hold_out(train, self.split_seed)
        *validation, test = others
        return Source(train, test, *validation)


class GTSRB(ImageFiles):
    """German traffic signs in 43 classes, RGB; 26,640 and 12,630 images."""

    folder = "gtsrb"
    names = tuple(map(str, range(43)))
    arguments = _BY_SPLIT


class DTD(ImageFiles):
    """Photographs of textures in 47 classes, the first partition: 1,880 images each to train, validate and test on."""

    folder = "dtd"
    names = tuple(map(str, range(47)))
    arguments = _VALIDATED


class EuroSAT(ImageFiles):
    """Satellite images of 10 kinds of land, 64×64 RGB; 27,000 images, of which a stratified fifth is for testing."""

    folder = "eurosat"
    names = tuple(map(str, range(10)))
    arguments = ({},)
