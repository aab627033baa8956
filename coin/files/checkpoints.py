"""Lightning's checkpoints: what is in them, read without unpickling."""

from pathlib import Path
from typing import Any

import torch

from coin.errors import FileError, first_line


def checkpoint_options(path: Path) -> dict[str, Any]:
    """Return the hyper-parameters in a Lightning checkpoint.

    Raises:
        FileError: The file is missing or damaged, or is no such checkpoint.
    """
    _check_there(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        _ = checkpoint["state_dict"], checkpoint["pytorch-lightning_version"]
        return dict(checkpoint["hyper_parameters"])
    except Exception as error:  # pickle's and zip's errors share no base class
        raise FileError(
            f"cannot read '{path}' as a Lightning checkpoint of an expert; give one that coin fit wrote"
        ) from error


def check_training_checkpoint(path: Path) -> None:
    """Look at a checkpoint that a training is to go on from.

    Raises:
        FileError: It is missing, damaged or no checkpoint of a training.
    """
    _check_there(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        whole = {"state_dict", "loops", "optimizer_states"} <= content.keys()
    except Exception as error:  # pickle's and zip's errors share no base class
        raise FileError(
            f"cannot read '{path}' as a checkpoint ({first_line(error)[:160]}); give one that coin fit wrote"
        ) from error
    if not whole:
        raise FileError(f"'{path}' is no checkpoint of a training, expected one to go on from; give one of coin fit's")


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise FileError(f"found no checkpoint '{path}', expected a file; check ckpt_path")
