"""scikit-learn's handwritten digits."""

import torch

from coin.data.samples import Samples
from coin.data.source import Source, hold_out
from coin.data.task import TaskData
from coin.errors import DataError

TEST_SHARE = 0.2


class Digits(TaskData):
    """1,797 handwritten digits of 8×8 grey pixels, from scikit-learn; upsampled to ``image_size``.

    A fifth of them, chosen by ``split_seed``, is the test split (359 images).
    """

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
        train, test = hold_out(Samples.of(images, torch.from_numpy(digits.target)), TEST_SHARE, self.split_seed)
        return Source(train, test)
