"""Tasks as LightningDataModules, one file per source, and the calibration data drawn from them."""

from coin.data.calibration import Calibration as Calibration, pooled as pooled
from coin.data.embedded import Digits as Digits, Glyphs as Glyphs, MNIST5k as MNIST5k
from coin.data.image_folder import ImageFolder as ImageFolder
from coin.data.samples import Samples as Samples, Source as Source
from coin.data.task import TaskData as TaskData
from coin.data.text import TextFile as TextFile
from coin.data.torchvision_sets import (
    CIFAR10 as CIFAR10,
    CIFAR100 as CIFAR100,
    DTD as DTD,
    GTSRB as GTSRB,
    KMNIST as KMNIST,
    MNIST as MNIST,
    STL10 as STL10,
    SVHN as SVHN,
    EMNISTLetters as EMNISTLetters,
    EuroSAT as EuroSAT,
    FashionMNIST as FashionMNIST,
    TorchvisionTask as TorchvisionTask,
)
from coin.data.transform import Augmentation as Augmentation, to_input as to_input
