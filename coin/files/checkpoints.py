"""Lightning's checkpoints, read without unpickling."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from coin.errors import FileError, first_line

TO_GO_ON = ("state_dict", "loops", "optimizer_states")  # what a training needs of a checkpoint


def read_checkpoint(path: Path, expected: Collection[str]) -> dict[str, Any]:
    """Return these parts of a Lightning checkpoint; a FileError where it has not all of them."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: content[name] for name in expected}
    except Exception as error:  # pickle's and zip's errors share no base class
        told = f"cannot read '{path}' as a checkpoint of a training ({first_line(error)[:160]})"
        raise FileError(f"{told}; check ckpt_path: give one that coin fit wrote") from error
