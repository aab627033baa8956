"""Tasks as LightningDataModules, one file per source, and the calibration data drawn from them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coin.data.augmentation import Augmentation
    from coin.data.calibration import Calibration, pooled
    from coin.data.embedded import Digits, Glyphs, MNIST5k
    from coin.data.image_folder import ImageFolder
    from coin.data.samples import Samples, Source
    from coin.data.task import TaskData
    from coin.data.text import TextFile, TextTask, Tweets
    from coin.data.torchvision_sets import (
        CIFAR10,
        CIFAR100,
        GTSRB,
        KMNIST,
        MNIST,
        STL10,
        SVHN,
        EMNISTLetters,
        FashionMNIST,
        TorchvisionTask,
    )
    from coin.data.transform import to_image, to_input

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "GTSRB",
    "KMNIST",
    "MNIST",
    "STL10",
    "SVHN",
    "Augmentation",
    "Calibration",
    "Digits",
    "EMNISTLetters",
    "FashionMNIST",
    "Glyphs",
    "ImageFolder",
    "MNIST5k",
    "Samples",
    "Source",
    "TaskData",
    "TextFile",
    "TextTask",
    "TorchvisionTask",
    "Tweets",
    "pooled",
    "to_image",
    "to_input",
]

_HOMES = "augmentation calibration embedded image_folder samples task text torchvision_sets transform"


def __getattr__(name: str) -> Any:
    """Import all of them when the first is used: a server that reads images or texts alone needs no Lightning."""
    if name not in __all__:
        raise AttributeError(f"module 'coin.data' has no attribute '{name}'")
    for home in _HOMES.split():
        module = import_module(f"coin.data.{home}")
        globals().update({each: getattr(module, each) for each in __all__ if hasattr(module, each)})
    return globals()[name]
