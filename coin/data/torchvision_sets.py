"""Tasks from torchvision's data sets, with their checksummed download."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor

from coin.data.image_io import read, to_square
from coin.data.samples import Source
from coin.data.task import TaskData
from coin.errors import DataError

T = TypeVar("T")

_BY_SPLIT = ({"split": "train"}, {"split": "test"})
_VALIDATED = ({"split": "train"}, {"split": "test"}, {"split": "val"})
_LETTERS = {"split": "letters", "target_transform": lambda label: label - 1}  # EMNIST counts from 1
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
    # Torchvision's arguments beside root and download: of the training and any test and validation split.
    arguments: ClassVar[tuple[dict[str, Any], ...]] = ({"train": True}, {"train": False})

    def __init__(self, *, root: str = "data", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.download = download

    def prepare_data(self) -> None:
        """Download what is missing, if ``download`` is set; a `DataError` where the files cannot be used."""
        self.once("prepared", lambda: self._each_split(len, self.download))

    def load(self) -> Source:
        """Read the downloaded files."""
        return Source(*self._each_split(read))

    def stored(self, image: Image.Image) -> Tensor:
        """An image as it is stored, uint8 [C, H, W]."""
        pixels: Tensor = pil_to_tensor(image)
        return pixels

    def _each_split(self, use: Callable[[Any], T], download: bool = False) -> list[T]:
        """What a function returns for each of torchvision's data sets; a DataError if files cannot be used."""
        name = type(self).__name__
        kind = getattr(datasets, name.removesuffix("Letters"))
        options = {"root": self.root, "download": download, "transform": self.stored}
        try:
            return [use(kind(**options, **arguments)) for arguments in self.arguments]
        # From AssertionError to BadZipFile, whatever torchvision, PIL and urllib raise.
        except Exception as error:
            failed = "the download failed and " if download else ""
            reason = str(error)[:200] or type(error).__name__
            folder = (self.root / self.folder).absolute()
            raise DataError(
                f"{name}: {failed}there are no usable files in {folder} ({reason}); "
                "copy them there and set download: false, or set download: true and use a Trainer"
            ) from error


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
    arguments = ({**_LETTERS, "train": True}, {**_LETTERS, "train": False})

    def stored(self, image: Image.Image) -> Tensor:
        """A letter upright: EMNIST stores them transposed."""
        return super().stored(image).mT


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


class PhotoTask(TorchvisionTask):
    """A set of image files, whose centre squares are held in memory, 3·S² bytes each."""

    side: ClassVar[int | None] = None  # of images that are all squares of one size, in pixels

    def stored(self, image: Image.Image) -> Tensor:
        """The centre square in the size of the inputs; of a smaller square as it is."""
        return to_square(image, min(self.image_size, self.side or self.image_size))


class GTSRB(PhotoTask):
    """German traffic signs in 43 classes, RGB; 26,640 and 12,630 images."""

    folder = "gtsrb"
    names = tuple(map(str, range(43)))
    arguments = _BY_SPLIT


class DTD(PhotoTask):
    """Photographs of textures in 47 classes, the first partition: 1,880 images each to train, validate and test on."""

    folder = "dtd"
    names = tuple(map(str, range(47)))
    arguments = _VALIDATED


class EuroSAT(PhotoTask):
    """Satellite images of 10 kinds of land, 64×64 RGB; 27,000 images, of which a stratified fifth is for testing."""

    folder = "eurosat"
    names = tuple(map(str, range(10)))
    arguments = ({},)
    side = 64
