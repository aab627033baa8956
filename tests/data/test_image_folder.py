import shutil

import numpy as np
import pytest
from PIL import Image

from coin.data import ImageFolder, image_folder
from coin.data.image_io import to_square
from coin.data.tasks import Tasks, task_with
from coin.errors import DataError

COLOURS = {"ant": (0, 100, 250), "cat": (200, 10, 20)}


def write(folder, count, colour, size=(12, 12)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size, colour).save(folder / f"{number:03}.png")


def write_split(root, split, count):
    """Write images of both classes."""
    for name, colour in COLOURS.items():
        write(root / split / name, count, colour)


@pytest.fixture
def root(tmp_path):
    """A folder of 20 training and 8 test images of two classes."""
    write_split(tmp_path / "images", "train", 10)
    write_split(tmp_path / "images", "test", 4)
    return tmp_path / "images"


def sizes(task):
    return [len(part) for part in task.splits]


def test_a_folder_becomes_a_task(root):
    (root / "train/cat/notes.txt").write_text("not an image")
    task = ImageFolder(str(root), validation_share=0.2)
    assert task.classes == ("ant", "cat")
    assert sizes(task) == [16, 8, 4]
    for part in task.splits:
        for image, label in zip(*part[:], strict=True):
            assert tuple(image[:, 0, 0]) == COLOURS[task.classes[label]]


def test_a_folder_for_validation_takes_the_place_of_a_share(root):
    write_split(root, "val", 3)
    assert sizes(ImageFolder(str(root))) == [20, 8, 6]


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
    write(root / "test/cat", 1, "red", size)
    splits = ImageFolder(str(root), image_size=image_size).splits
    for part in (splits.train, splits.test):
        images, _ = part[:]
        assert images.shape[1:] == (3, side, side)


def test_the_seeds_and_uses_of_a_task_read_it_once_and_a_new_task_anew(root):
    given = ImageFolder(str(root), image_size=16)
    key = given.content_key()
    splits = given.splits
    write_split(root, "train", 11)
    copy = task_with(given, seed=1)
    both = Tasks({"a": task_with(copy, batch_size=4)}, samples_per_task=3)
    both.setup()
    assert both.tasks["a"].splits is splits
    assert copy.content_key() == key
    again = ImageFolder(str(root), validation_share=0.0)
    assert again.content_key() != key
    assert sizes(again) == [22, 8, 0]


@pytest.mark.parametrize(
    ("mode", "extension"), [("L", "png"), ("P", "png"), ("RGB", "JPEG"), ("RGBA", "webp")]
)
def test_every_image_becomes_rgb(root, mode, extension):
    grey = Image.new("L", (12, 12), 77)
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
    "train'; expected images as .*train/CLASS": lambda root: shutil.rmtree(root / "train"),
    "test'; expected images as .*test/CLASS": lambda root: shutil.rmtree(root / "test"),
    "test and train do not both .*'cat'": lambda root: shutil.rmtree(root / "train/cat"),
    "test and train .*'cat'; both need": lambda root: shutil.rmtree(root / "test/cat"),
    "val and train do not both .*'cat'": lambda root: write(root / "val/ant", 1, "red"),
    "bee.*train/CLASS": lambda root: (root / "train/bee").mkdir(),
}


@pytest.mark.parametrize("use", [ImageFolder.content_key, ImageFolder.setup])
@pytest.mark.parametrize("message", LACKS)
def test_a_folder_that_lacks_something_is_refused(message, use, root):
    LACKS[message](root)
    with pytest.raises(DataError, match=message):
        use(ImageFolder(str(root)))


@pytest.mark.parametrize(("name", "extension"), [("000", "png"), ("zzz", "jpg"), ("zzz", "bmp")])
def test_a_truncated_image_is_named(root, name, extension):
    torn = root / f"train/ant/{name}.{extension}"
    Image.effect_noise((64, 64), 50).save(torn)
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    message = rf"^{torn} cannot be read as an image .* replace or remove it$"
    with pytest.raises(DataError, match=message):
        ImageFolder(str(root)).setup()


@pytest.mark.parametrize("size", [(100, 60), (60, 100)])
def test_the_centre_square_is_kept(size):
    width, height = size
    left = (width - 60) // 2
    top = (height - 60) // 2
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (left, top, left + 60, top + 60))
    inner = to_square(image, 32)[:, 2:-2, 2:-2]  # the border is mixed with what is beside it
    assert (inner == 255).all()


def key(folder):
    return ImageFolder(str(folder)).content_key()


def test_a_copy_has_the_same_key_and_changed_pixels_or_names_another(root, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)
    assert key(copy) == key(root)
    first = copy / "train/ant/000.png"
    content = bytearray(first.read_bytes())
    content[-20] ^= 1
    first.write_bytes(content)  # of the same size
    assert key(copy)["train"] != key(root)["train"]
    assert key(copy)["test"] == key(root)["test"]
    # Of large folders the files' beginnings alone.
    monkeypatch.setattr(image_folder, "KEYED_BYTES", 20 * 16)
    assert key(copy) == key(root)
    first.rename(first.with_name("new.png"))
    assert key(copy) != key(root)
