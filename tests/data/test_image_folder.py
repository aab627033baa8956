import shutil

import numpy as np
import pytest
from PIL import Image

from coin.data import ImageFolder, image_folder
from coin.data.image_io import to_square
from coin.data.tasks import Tasks, task_with
from coin.errors import DataError

COLOURS = {"ant": (0, 100, 250), "cat": (200, 10, 20)}


def write(folder, count, size=(12, 12), colour=None, extension="png"):
    """Write images of one colour, or of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        if colour is not None:
            pixels[:] = colour
        Image.fromarray(pixels).save(folder / f"{number:03}.{extension}")


@pytest.fixture
def root(tmp_path):
    """A folder of 20 training and 8 test images of two classes."""
    for split, count in (("train", 10), ("test", 4)):
        for name, colour in COLOURS.items():
            write(tmp_path / split / name, count, colour=colour)
    return tmp_path


def sizes(task):
    return [len(part) for part in (task.splits.train, task.splits.validation, task.splits.test)]


def test_a_folder_becomes_a_task(root):
    (root / "train/cat/notes.txt").write_text("not an image")
    task = ImageFolder(str(root), validation_share=0.2)
    assert task.classes == ("ant", "cat")
    assert sizes(task) == [16, 4, 8]
    for part in task.splits:
        for image, label in zip(*part[:], strict=True):
            assert tuple(image[:, 0, 0]) == COLOURS[task.classes[label]]


def test_a_folder_for_validation_takes_the_place_of_a_share(root):
    write(root / "val/ant", 3)
    write(root / "val/cat", 3)
    assert sizes(ImageFolder(str(root))) == [20, 6, 8]


@pytest.mark.parametrize(
    ("size", "image_size", "side"),
    [
        ((12, 12), 32, 12),
        ((12, 12), 8, 8),
        ((13, 13), 16, 16),
        ((12, 30), 16, 16),
        ((40, 20), 16, 16),
    ],
)
def test_only_small_squares_of_one_size_are_kept_as_they_are(root, size, image_size, side):
    write(root / "test/cat", 1, size)
    splits = ImageFolder(str(root), image_size=image_size).splits
    for part in (splits.train, splits.test):
        images, _ = part[:]
        assert images.shape[1:] == (3, side, side)


def test_the_seeds_and_uses_of_a_task_read_it_once(root):
    given = ImageFolder(str(root), image_size=16)
    key = given.content_key()
    splits = given.splits
    shutil.rmtree(root)
    for seed in range(3):
        task = task_with(given, seed=seed)
        both = Tasks({"a": task_with(task, batch_size=4)}, samples_per_task=3)
        both.setup()
        assert both.calibration().num_samples == 3
        assert task.splits is splits
        assert task.content_key() == key


def test_a_new_task_looks_anew(root):
    key = ImageFolder(str(root)).content_key()
    write(root / "train/cat", 11)
    again = ImageFolder(str(root), validation_share=0.0)
    assert again.content_key() != key
    assert sizes(again) == [21, 0, 8]


@pytest.mark.parametrize(
    ("mode", "extension"), [("L", "png"), ("P", "png"), ("RGB", "JPEG"), ("RGBA", "webp")]
)
def test_every_image_becomes_rgb(root, mode, extension):
    grey = Image.fromarray(np.full((12, 12), 77, dtype=np.uint8))
    grey.convert(mode).save(root / f"train/ant/zzz.{extension}")
    images, labels = ImageFolder(str(root), validation_share=0.0).splits.train[:]
    last = images[labels == 0][-1]
    assert last.shape == (3, 12, 12)
    assert last.unique().tolist() == [77]


def test_deep_pixels_are_refused(root):
    Image.fromarray(np.full((12, 12), 40_000, np.uint16)).save(root / "test/cat/deep.png")
    with pytest.raises(DataError, match=r"deep.png has pixels of type 'I(;16)?'; expected 8 bits"):
        ImageFolder(str(root)).setup()


LACKS = {
    "train": (
        lambda root: shutil.rmtree(root / "train"),
        "train'; expected images as .*train/CLASS",
    ),
    "test": (lambda root: shutil.rmtree(root / "test"), "test'; expected images as .*test/CLASS"),
    "a class to train": (
        lambda root: shutil.rmtree(root / "train/cat"),
        "test and train do not both .*'cat'",
    ),
    "a class to test": (
        lambda root: shutil.rmtree(root / "test/cat"),
        "test and train do not both .*'cat'",
    ),
    "a class to validate": (
        lambda root: write(root / "val/ant", 1),
        "val and train do not both .*'cat'; both need",
    ),
    "images of a class": (lambda root: (root / "train/bee").mkdir(), "bee.*train/CLASS"),
}


@pytest.mark.parametrize("use", [ImageFolder.content_key, ImageFolder.setup])
@pytest.mark.parametrize("case", LACKS)
def test_a_folder_that_lacks_something_is_refused(case, use, root):
    change, message = LACKS[case]
    change(root)
    with pytest.raises(DataError, match=message):
        use(ImageFolder(str(root)))


@pytest.mark.parametrize(("name", "extension"), [("000", "png"), ("zzz", "jpg"), ("zzz", "bmp")])
def test_a_truncated_image_is_named(root, name, extension):
    write(root / "spare", 1, (64, 64), extension=extension)
    data = (root / f"spare/000.{extension}").read_bytes()
    torn = root / f"train/ant/{name}.{extension}"
    torn.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        DataError, match=rf"^{torn} cannot be read as an image .* replace or remove it$"
    ):
        ImageFolder(str(root)).setup()


@pytest.mark.parametrize("size", [(100, 60), (60, 100)])
def test_the_centre_square_is_kept(size):
    width, height = size
    centre = min(size)
    image = Image.new("RGB", size)
    left = (width - centre) // 2
    top = (height - centre) // 2
    image.paste((255, 255, 255), (left, top, left + centre, top + centre))
    inner = to_square(image, 32)[:, 2:-2, 2:-2]  # the border is mixed with what is beside it
    assert (inner == 255).all()


@pytest.fixture
def copy(root, tmp_path_factory):
    """A copy of the folder, with times of its own."""
    folder = tmp_path_factory.mktemp("copy") / "images"
    shutil.copytree(root, folder, copy_function=shutil.copyfile)
    return folder


def key(folder):
    return ImageFolder(str(folder)).content_key()


def test_a_copy_has_the_same_key_and_changed_pixels_another(root, copy, monkeypatch):
    assert key(copy) == key(root)
    first = copy / "train/ant/000.png"
    content = bytearray(first.read_bytes())
    content[-20] ^= 1
    first.write_bytes(content)  # of the same size
    assert key(copy)["train"] != key(root)["train"]
    assert key(copy)["test"] == key(root)["test"]
    monkeypatch.setattr(
        image_folder, "KEYED_BYTES", 28 * 16
    )  # of large folders the files' beginnings alone
    assert key(copy) == key(root)


def test_a_renamed_image_changes_the_key(root, copy):
    first = copy / "train/ant/000.png"
    first.rename(first.with_name("new.png"))
    assert key(copy) != key(root)
