"""Batches: tensors, and tensors by name."""

import pytest
import torch

from coin.core.batches import channels_last, joined, samples_of, size_of, take
from coin.errors import DataError

TEXTS = torch.arange(6).view(3, 2)
BATCHES = {"a tensor": TEXTS, "by name": {"tokens": TEXTS, "mask": TEXTS[:, :1]}}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_a_batch_is_split_and_joined(batch):
    assert size_of(batch) == 3
    parts = [take(batch, slice(0, 2)), take(batch, torch.tensor([2]))]
    torch.testing.assert_close(joined(parts), batch)
    torch.testing.assert_close(joined(list(samples_of(batch))), batch)


def test_samples_of_several_shapes_are_not_joined():
    message = "found calibration samples of shapes .*2.* and .*3.* to run together, expected one shape; pad them"
    with pytest.raises(DataError, match=message):
        joined([torch.ones(2, 2), torch.ones(2, 3)])


def test_channels_of_images_alone_are_last_in_memory():
    batch = {"images": torch.ones(2, 3, 4, 4), "tokens": TEXTS}
    found = channels_last(batch)
    assert found["images"].is_contiguous(memory_format=torch.channels_last)
    assert found["tokens"] is TEXTS
