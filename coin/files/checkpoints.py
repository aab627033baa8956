"""Lightning's checkpoints: what is in them, read without unpickling."""

from pathlib import Path
from typing import Any

import torch

from coin.errors import FileError, first_line


def checkpoint_options(path: Path) -> dict[str, Any]:
    """Return the hyper-parameters in a Lightning checkpoint of an expert; a FileError where it is none."""
    return dict(_read(path, {"state_dict", "hyper_parameters"})["hyper_parameters"])


def check_training_checkpoint(path: Path) -> None:
    """Raise a FileError unless a training can go on from this checkpoint."""
    _read(path, {"state_dict", "loops", "optimizer_states"})


def _read(path: Path, expected: set[str]) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = {name: content[name] for name in expected}
    except Exception as error:  # pickle's and zip's errors share no base class
        told = f"cannot read '{path}' as a checkpoint of a training ({first_line(error)[:160]})"
        raise FileError(f"{told}; check ckpt_path: give one that coin fit wrote") from error
    return found
