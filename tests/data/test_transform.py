import pytest
import torch

from coin.data import to_image, to_input
from coin.errors import DataError

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


def test_values_are_scaled_and_normalised():
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = to_input(images, 8)
    assert x.dtype == torch.float32
    for sample in range(4):
        for channel in range(3):
            expected = (images[sample, channel].double() / 255 - MEAN[channel].double()) / STD[channel].double()
            torch.testing.assert_close(x[sample, channel].double(), expected, rtol=1e-5, atol=1e-6)


def test_images_come_back_as_they_were():
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert to_image(to_input(images, 16)).equal(images)
    assert to_image(to_input(images[:, :1], 16)).equal(images[:, :1].expand(5, 3, 16, 16))
    flat = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    assert to_image(to_input(flat, 32), 8).equal(flat[..., :8, :8])


def test_grey_images_become_three_equal_channels_before_normalisation():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    x = to_input(images, 8)
    assert x.shape == (1, 3, 8, 8)
    torch.testing.assert_close(x, to_input(images.expand(1, 3, 8, 8), 8), rtol=0, atol=0)


@pytest.mark.parametrize("side", [4, 16, 9])
def test_resizing_keeps_constants_and_means(side):
    constant = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    expected = ((100 / 255 - MEAN) / STD).view(1, 3, 1, 1).expand(2, 3, side, side)
    torch.testing.assert_close(to_input(constant, side), expected)


def test_halving_is_antialiased():
    stripes = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 255
    grey = (to_input(stripes, 8)[:, 0] * STD[0] + MEAN[0])[..., 2:-2]
    assert (grey - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 2, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 3, 8, 8, dtype=torch.int64),
    ],
)
def test_other_images_are_refused(images):
    with pytest.raises(DataError, match=r"expected torch.uint8 \[B, 1 or 3, H, W\]"):
        to_input(images, 8)


def test_tokens_are_inputs_already_and_as_many_as_the_network_reads():
    tokens = torch.arange(8).view(2, 4)
    assert to_input(tokens, 4) is tokens
    with pytest.raises(DataError, match="texts have 4 tokens; expected 8"):
        to_input(tokens, 8)
