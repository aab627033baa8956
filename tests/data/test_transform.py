import pytest
import torch
from torch.nn import functional as F

from coin.data import Augmentation, to_input
from coin.data.transform import View, augmented, draw_augmentation
from coin.errors import DataError

MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
IMAGES = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_values_are_scaled_and_normalised():
    expected = (IMAGES.double() / 255 - MEAN.double()) / STD.double()
    x = to_input(IMAGES, 16)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(to_input(IMAGES[:, :1], 16), to_input(IMAGES[:, :1].expand(5, 3, 16, 16), 16))


def test_halving_is_antialiased():
    stripes = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 255
    grey = (to_input(stripes, 8) * STD + MEAN)[..., 2:-2]
    assert (grey - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 3, 8, 8), torch.float32), ((3, 8, 8), torch.uint8), ((1, 2, 8, 8), torch.uint8), ((2, 3, 8, 8), torch.int64)],
)
def test_other_images_are_refused(shape, dtype):
    with pytest.raises(DataError, match=r"expected torch.uint8 \[B, 1 or 3, H, W\]"):
        to_input(torch.zeros(shape, dtype=dtype), 8)


def test_tokens_are_inputs_already():
    tokens = torch.arange(8).view(2, 4)
    assert to_input(tokens, 32) is tokens


@pytest.mark.parametrize("kind", list(Augmentation))
def test_augmentation_equals_cropping_one_by_one(kind):
    given = torch.randint(256, (40, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    draws = draw_augmentation(40, 16, 24, seed=0, epoch=0)
    assert set(draws[:, 0].tolist()) <= set(range(5))
    assert set(draws[:, 2].tolist()) == {0, 1}
    padded = F.pad(given.float(), (3, 3, 2, 2), mode="replicate" if kind is Augmentation.shift else "constant").byte()
    result = augmented(given, View(kind, 0, 0), torch.arange(40), 40)
    for image, own, (top, left, flip), got in zip(padded, given, draws.tolist(), result, strict=True):
        expected = own if kind is Augmentation.none else image[:, top : top + 16, left : left + 24]
        assert torch.equal(got, expected.flip(2) if flip and kind is Augmentation.crop_flip else expected)
