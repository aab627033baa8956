"""Rendered characters in random fonts, poses and colours."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from coin.data.samples import Samples, Source
from coin.data.sampling import Stream, seeded
from coin.data.task import TaskData, at_least
from coin.errors import ConfigurationError, DataError

CANVAS = 48
"""Side of a mask in pixels."""

FONT_SIZE = 32
"""Nominal height of the letters in pixels, the same for all fonts, so that A and a keep their proportion."""

# They name a glyph for every code, or for the letters' codes, but it is a box or a mathematical sign.
_NOT_LETTERS = ("LastResort", "cmex10", "cmsy10")

SIDE = 32
"""Side of the rendered images in pixels."""

ROTATION = 25.0
"""Largest rotation either way, in degrees."""

SCALE = (0.6, 1.1)
"""Range of the size, relative to a letter height of about 20 pixels."""

SHIFT = 4.0
"""Largest shift along each axis, in pixels."""

CONTRAST = 0.2
"""Least difference of luminance between ink and paper, out of 1."""

NOISE = 0.15
"""Largest standard deviation of the pixels' Gaussian noise, out of 1."""

_CHUNK = 4096
_LUMINANCE = (0.299, 0.587, 0.114)


class Glyphs(TaskData):
    """Characters in RGB at 32×32, rendered from the fonts that ship with matplotlib: no download.

    Font, rotation, size, position, colours and noise are random and follow from ``split_seed`` and the classes. An
    upper-case letter and its lower-case form are two classes.

    Args:
        classes: The characters, as ranges and single ones ("A-J", "K-Za-z", "0-9AEX"), or as a list.
        train_per_class: Training images of each class (validation comes out of them).
        test_per_class: Test images of each class.
        train_samples: Training images of all classes together, in place of ``train_per_class``; as even as it can be.
        kwargs: See `TaskData`.

    Raises:
        ConfigurationError: An option is out of range; the classes cannot be read, repeat or are fewer than two.
    """

    reads_at_size = False

    def __init__(
        self,
        *,
        classes: str | list[str] = "A-J",
        train_per_class: int = 400,
        test_per_class: int = 100,
        train_samples: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.characters = parse_characters(classes)
        at_least("train_per_class", train_per_class, 2)
        at_least("test_per_class", test_per_class, 1)
        if train_samples is not None:
            at_least("train_samples", train_samples, len(self.characters), why="one image for each class")
        self.train_per_class = train_per_class
        self.test_per_class = test_per_class
        self.train_samples = train_samples

    def class_names(self) -> tuple[str, ...]:
        """The characters."""
        return self.characters

    def load(self) -> Source:
        """Render the images.

        Raises:
            DataError: A font cannot draw one of the characters.
        """
        count = len(self.characters)
        masks = character_masks(self.characters)
        train = torch.arange(self.train_samples or count * self.train_per_class) % count
        test = torch.arange(count * self.test_per_class) % count
        return Source(
            Samples.of(render(masks, train, seeded(self.split_seed, Stream.RENDER_TRAIN)), train),
            Samples.of(render(masks, test, seeded(self.split_seed, Stream.RENDER_TEST)), test),
        )


def parse_characters(classes: str | list[str]) -> tuple[str, ...]:
    """Read a list of characters, or a string of ranges and single characters such as "K-Za-z0".

    Raises:
        ConfigurationError: It cannot be read, a character repeats, or there are fewer than two.
    """
    characters: list[str] = []
    if isinstance(classes, str):
        rest = classes
        while rest:
            first, last, length = (rest[0], rest[2], 3) if len(rest) > 2 and rest[1] == "-" else (rest[0], rest[0], 1)
            if not (first.isalnum() and last.isalnum() and first <= last):
                raise ConfigurationError(
                    f"the classes {classes!r} hold {rest[:length]!r}; expected characters and rising ranges, as in "
                    "'A-J' or 'K-Za-z'"
                )
            characters += map(chr, range(ord(first), ord(last) + 1))
            rest = rest[length:]
    else:
        characters = list(classes)
    wrong = [character for character in characters if len(character) != 1 or not character.isalnum()]
    if wrong:
        raise ConfigurationError(f"the classes {classes!r} hold {wrong[0]!r}; expected single letters and digits")
    if len(set(characters)) != len(characters):
        repeated = next(c for i, c in enumerate(characters) if c in characters[:i])
        raise ConfigurationError(f"the classes {classes!r} hold {repeated!r} twice; name each once")
    if len(characters) < 2:
        raise ConfigurationError(f"the classes {classes!r} are {len(characters)} character(s); expected at least 2")
    return tuple(characters)


@cache
def usable_fonts() -> tuple[Path, ...]:
    """The shipped fonts in which all of A-Z, a-z and 0-9 are drawn, sorted by name."""
    letters = {ord(character) for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"}
    folder = Path(get_data_path(), "fonts", "ttf")
    return tuple(
        path
        for path in sorted(folder.glob("*.ttf"))
        if not path.name.startswith(_NOT_LETTERS) and letters <= FT2Font(str(path)).get_charmap().keys()
    )


def character_masks(characters: Sequence[str]) -> Tensor:
    """Every character in every usable font, its ink centred.

    Returns:
        Coverage from 0 to 1, float32 [fonts, characters, CANVAS, CANVAS].

    Raises:
        DataError: A font lacks a character, or draws nothing for it.
    """
    masks = np.zeros((len(usable_fonts()), len(characters), CANVAS, CANVAS), dtype=np.uint8)
    for row, path in enumerate(usable_fonts()):
        font = ImageFont.truetype(str(path), FONT_SIZE)
        available = FT2Font(str(path)).get_charmap()
        for column, character in enumerate(characters):
            left, top, right, bottom = font.getbbox(character)
            if ord(character) not in available or right <= left or bottom <= top:
                raise DataError(f"the font {path.name} cannot draw {character!r}; choose classes from A-Z, a-z and 0-9")
            canvas = Image.new("L", (CANVAS, CANVAS))
            corner = ((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2)
            ImageDraw.Draw(canvas).text(corner, character, fill=255, font=font)
            masks[row, column] = np.asarray(canvas)
    return torch.from_numpy(masks).float() / 255


def render(masks: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Render one image for each label.

    Args:
        masks: Ink coverage of every class in every font, float32 [fonts, C, CANVAS, CANVAS].
        labels: Which class to draw, int64 [P].
        generator: Decides everything random.

    Returns:
        uint8 [P, 3, SIDE, SIDE].
    """
    images = torch.empty(len(labels), 3, SIDE, SIDE, dtype=torch.uint8)
    for start in range(0, len(labels), _CHUNK):
        rows = slice(start, start + _CHUNK)
        images[rows] = _render_chunk(masks, labels[rows], generator)
    return images


def _render_chunk(masks: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    fonts = torch.randint(len(masks), (count,), generator=generator)
    angle = uniform(-math.radians(ROTATION), math.radians(ROTATION))
    scale = uniform(*SCALE)
    shift = uniform(-SHIFT, SHIFT, 2) * 2 / SIDE
    # Output coordinates → mask coordinates, both in [-1, 1]: undo the shift, the rotation and the scale.
    zoom = SIDE / CANVAS / scale
    cosine, sine = zoom * torch.cos(angle), zoom * torch.sin(angle)
    linear = torch.stack([cosine, -sine, sine, cosine], 1).view(count, 2, 2)
    affine = torch.cat([linear, -linear @ shift.unsqueeze(2)], 2)
    grid = F.affine_grid(affine, [count, 1, SIDE, SIDE], align_corners=False)
    ink = F.grid_sample(masks[fonts, labels].unsqueeze(1), grid, align_corners=False)

    paper_colour, ink_colour = _colours(count, generator)
    images = torch.lerp(paper_colour[:, :, None, None], ink_colour[:, :, None, None], ink)
    sigma = uniform(0, NOISE, 1, 1, 1)
    images += sigma * torch.randn(images.shape, generator=generator)
    return images.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def _colours(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random colours of paper and ink, each [count, 3] in [0, 1], that differ in luminance by `CONTRAST` or more."""
    candidates = 8
    paper = torch.rand(count, 3, generator=generator)
    inks = torch.rand(count, candidates, 3, generator=generator)
    weights = torch.tensor(_LUMINANCE)
    paper_luminance = paper @ weights
    contrast = (inks @ weights - paper_luminance[:, None]).abs()
    first = (contrast >= CONTRAST).int().argmax(1)
    row = torch.arange(count)
    # Black or white for the few papers on which no candidate stands out.
    extreme = (paper_luminance < 0.5).float()[:, None].expand(-1, 3)
    enough = contrast[row, first] >= CONTRAST
    return paper, torch.where(enough[:, None], inks[row, first], extreme)
