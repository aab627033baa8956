import pytest
import torch
from torch.nn import functional as F

from coin.data import Augmentation, to_input
from coin.data.transform import View, augmented, draw_augmentation
from coin.errors import DataError

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)


def random_images(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
def test_values_are_scaled_and_normalised(channels):
    images = random_images(5, channels, 16, 16)
    expected = (images.double() / 255 - MEAN) / STD
    torch.testing.assert_close(to_input(images, 16), expected.float(), rtol=1e-5, atol=1e-6)


def test_halving_is_antialiased():
    stripes = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 255
    grey = to_input(stripes, 8) * STD + MEAN
    assert (grey[..., 2:-2] - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(3, 8, 8).byte(),
        torch.zeros(1, 2, 8, 8).byte(),
        torch.zeros(2, 3, 8, 8).long(),
    ],
    ids=["floats", "one image", "two channels", "integers"],
)
def test_other_images_are_refused(images):
    with pytest.raises(DataError, match=r"expected torch.uint8 \[B, 1 or 3, H, W\]"):
        to_input(images, 8)


def test_tokens_are_inputs_already():
    tokens = torch.arange(8).view(2, 4)
    assert to_input(tokens, 32) is tokens


def expected_view(kind, image, top, left, flip):
    """Return one image, uint8 [C, 16, 24], as it is augmented."""
    if kind is Augmentation.none:
        return image
    mode = "replicate" if kind is Augmentation.shift else "constant"
    padded = F.pad(image.float(), (3, 3, 2, 2), mode=mode).byte()
    crop = padded[:, top : top + 16, left : left + 24]
    is_flipped = flip and kind is Augmentation.crop_flip
    return crop.flip(2) if is_flipped else crop


@pytest.mark.parametrize("kind", list(Augmentation))
def test_augmentation_is_a_crop_of_each_sample_by_its_own_draw(kind):
    images = random_images(40, 3, 16, 24)
    draws = draw_augmentation(40, 16, 24, seed=0, epoch=0).tolist()
    places = torch.arange(40).flip(0)
    found = augmented(images[places], View(kind, seed=0, epoch=0), places, samples=40)
    for place, image in zip(places.tolist(), found, strict=True):
        assert torch.equal(image, expected_view(kind, images[place], *draws[place]))


@pytest.mark.parametrize(("column", "choices"), [(0, 5), (1, 7), (2, 2)])
def test_draws_are_all_crops_and_flips(column, choices):
    draws = draw_augmentation(400, 16, 24, seed=0, epoch=0)[:, column]
    assert draws.unique().tolist() == list(range(choices))
