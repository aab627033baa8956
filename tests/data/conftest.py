import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def on_process() -> Callable[..., Any]:
    """Return a function that gives a datamodule a Trainer's view of the processes."""

    def see(data: Any, rank: int, world_size: int, epoch: int = 0) -> Any:
        data.trainer = SimpleNamespace(
            global_rank=rank,
            world_size=world_size,
            current_epoch=epoch,
            training=False,
            testing=False,
            predicting=False,
        )
        data.setup()
        return data

    return see


def write_mnist_like(folder, prefixes=("train", "t10k"), first=0, classes=10, each=1):
    """Write so many images of each class to train and to test on in MNIST's format, and return the images."""
    folder.mkdir(parents=True, exist_ok=True)
    count = classes * each
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, count, 1, 28, 28), generator=draw, dtype=torch.uint8)
    labels = torch.arange(first, first + classes, dtype=torch.uint8).repeat(each)
    for prefix, of_split in zip(prefixes, images, strict=True):
        header = struct.pack(">HBBIII", 0, 8, 3, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + of_split.numpy().tobytes())
        header = struct.pack(">HBBI", 0, 8, 1, count)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    return images
