"""Tasks as LightningDataModules, one file per source, and the calibration data drawn from them."""

from typing import TYPE_CHECKING

from coin.core.lazy import importing

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
        DTD,
        GTSRB,
        KMNIST,
        MNIST,
        STL10,
        SUN397,
        SVHN,
        EMNISTLetters,
        EuroSAT,
        FashionMNIST,
        StanfordCars,
        TorchvisionTask,
    )
    from coin.data.transform import to_image, to_input

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DTD",
    "GTSRB",
    "KMNIST",
    "MNIST",
    "STL10",
    "SUN397",
    "SVHN",
    "Augmentation",
    "Calibration",
    "Digits",
    "EMNISTLetters",
    "EuroSAT",
    "FashionMNIST",
    "Glyphs",
    "ImageFolder",
    "MNIST5k",
    "Samples",
    "Source",
    "StanfordCars",
    "TaskData",
    "TextFile",
    "TextTask",
    "TorchvisionTask",
    "Tweets",
    "pooled",
    "to_image",
    "to_input",
]

# All at once: a command finds a task by its short name among those that are imported.
__getattr__ = importing(
    __name__,
    [
        "augmentation",
        "calibration",
        "embedded",
        "image_folder",
        "samples",
        "task",
        "text",
        "torchvision_sets",
        "transform",
    ],
)
