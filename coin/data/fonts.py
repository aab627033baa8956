"""Grey masks of characters, rendered with PIL from the fonts that ship with matplotlib."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from coin.errors import DataError

CANVAS = 48
"""Side of a mask in pixels."""

FONT_SIZE = 32
"""Nominal height of the letters in pixels, the same for all fonts, so that A and a keep their proportion."""

# They name a glyph for every code, or for the letters' codes, but it is a box or a mathematical sign.
_NOT_LETTERS = ("LastResort", "cmex10", "cmsy10")


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
