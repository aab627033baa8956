import pytest
import torch

from coin.data import to_image, to_input
from coin.errors import DataError

MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
IMAGES = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_values_are_scaled_and_normalised():
    expected = (IMAGES.double() / 255 - MEAN.double()) / STD.double()
    x = to_input(IMAGES, 16)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(to_input(IMAGES[:, :1], 16), to_input(IMAGES[:, :1].expand(5, 3, 16, 16), 16))


def test_images_come_back_as_they_were():
    assert to_image(to_input(IMAGES, 16)).equal(IMAGES)
    flat = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    for side in (9, 32):
        assert to_image(to_input(flat, side), 8).equal(flat[..., :8, :8])


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


def test_tokens_are_inputs_already_and_as_many_as_the_network_reads():
    tokens = torch.arange(8).view(2, 4)
    assert to_input(tokens, 4) is tokens
    with pytest.raises(DataError, match="texts have 4 tokens; expected 8"):
        to_input(tokens, 8)
