import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coin.data import ImageFolder, image_folder, image_io
from coin.data.image_io import to_square
from coin.data.tasks import Tasks, task_with
from coin.errors import DataError


def write(folder, count, size=(12, 12), colour=None, extension="png"):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        if colour is not None:
            pixels[:] = colour
        Image.fromarray(pixels).save(folder / f"{number:03}.{extension}")


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 10), ("test", 4)):
        write(tmp_path / split / "cat", count, colour=(200, 10, 20))
        write(tmp_path / split / "ant", count, colour=(0, 100, 250))
    return tmp_path


def test_a_folder_becomes_a_task_and_other_files_are_passed_over(root):
    for place in ("cat/notes.txt", "cat/.hidden.png"):
        (root / "train" / place).write_text("not an image")
    task = ImageFolder(str(root), validation_share=0.2)
    assert task.classes == ("ant", "cat")
    splits = task.splits
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [16, 4, 8]
    for part in (splits.train, splits.test):
        for image, label in zip(*part[:], strict=True):
            assert image[:, 0, 0].tolist() == [[0, 100, 250], [200, 10, 20]][label]
    for name in ("cat", "ant"):
        write(root / "val" / name, 3)
    splits = ImageFolder(str(root)).splits
    assert (len(splits.train), len(splits.validation)) == (20, 6)


@pytest.mark.parametrize(
    ("size", "image_size", "expected"),
    [((12, 12), 32, 12), ((12, 12), 8, 8), ((13, 13), 16, 16), ((12, 30), 16, 16), ((40, 20), 16, 16)],
)
def test_only_small_squares_of_one_size_are_kept_as_they_are(root, size, image_size, expected):
    write(root / "test" / "cat", 1, size)
    splits = ImageFolder(str(root), image_size=image_size).splits
    for part in (splits.train, splits.test):
        images, _ = part[:]
        assert images.shape[1:] == (3, expected, expected)


def test_the_seeds_and_uses_of_tasks_decode_once(root, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(root, other, dirs_exist_ok=True)
    counts = {"decoded": Counter(), "stats": Counter()}

    def counted(owner, name, counter):
        real = getattr(owner, name)

        def count(file, *args, **options):
            counter.update([str(getattr(file, "filename", file))])
            return real(file, *args, **options)

        monkeypatch.setattr(owner, name, count)

    counted(image_io, "to_square", counts["decoded"])
    counted(Path, "stat", counts["stats"])
    given = {"a": ImageFolder(str(root), image_size=16), "b": ImageFolder(str(other), image_size=16)}
    keys = set()
    for tasks in [{name: task_with(task, seed=seed) for name, task in given.items()} for seed in range(3)]:
        keys |= {str(task.content_key()) for task in tasks.values()}
        both = Tasks({name: task_with(task, batch_size=4) for name, task in tasks.items()}, samples_per_task=3)
        both.setup()
        both.calibration()
    assert len(keys) == 1  # names, sizes and times are alike
    assert len(counts["decoded"]) == 56
    assert counts["decoded"].total() == 56 + 4  # the first of a split shows the size of all
    assert {count for path, count in counts["stats"].items() if path.endswith(".png")} == {1}
    # A new task looks anew.
    write(root / "train" / "cat", 11, colour=(1, 2, 3))
    again = ImageFolder(str(root), image_size=16, validation_share=0.0)
    assert str(again.content_key()) not in keys
    assert len(again.splits.train) == 21


def test_grey_palette_and_jpeg_images_become_rgb_and_deep_pixels_are_refused(root):
    image = Image.fromarray(np.full((12, 12), 77, dtype=np.uint8))
    image.save(root / "train" / "ant" / "grey.png")
    image.convert("P").save(root / "train" / "ant" / "palette.gif")
    image.convert("RGB").save(root / "train" / "ant" / "photo.JPEG", quality=95)
    images, _ = ImageFolder(str(root), validation_share=0.0).splits.train[:]
    assert images.shape == (23, 3, 12, 12)
    assert int((images == 77).flatten(1).all(1).sum()) == 3
    Image.fromarray(np.full((12, 12), 40_000, np.uint16)).save(root / "test/cat/deep.png")
    with pytest.raises(DataError, match=r"deep.png has pixels of type 'I(;16)?'; expected 8 bits"):
        ImageFolder(str(root)).setup()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: shutil.rmtree(root / "train"),
            r"No such file.*train'; expected images .*train/CLASS.*set",
        ),
        (lambda root: shutil.rmtree(root / "test"), r"No such file .*test'; expected images as .*test/CLASS"),
        (lambda root: shutil.rmtree(root / "train/cat"), "test and train do not both have the class folder 'cat'"),
        (
            lambda root: [(root / split / "bee").mkdir() for split in ("train", "test")],
            "classes bee.*train/CLASS",
        ),
        (
            lambda root: (root / "test/bee").mkdir() or write(root / "train/bee", 1),
            "classes bee.*test/CLASS",
        ),
        (lambda root: write(root / "test/bee", 1), "test and train do not both have the class folder 'bee'; both need"),
        (lambda root: shutil.rmtree(root / "test/cat"), "test and train do not both have the class folder 'cat'"),
        (lambda root: write(root / "val/ant", 1), "val and train do not both have the class folder 'cat'"),
    ],
)
def test_a_folder_that_lacks_something_is_told_before_any_image_is_read(root, change, message):
    change(root)
    for use in (ImageFolder.content_key, ImageFolder.setup):
        with pytest.raises(DataError, match=message):
            use(ImageFolder(str(root)))


@pytest.mark.parametrize(("name", "extension"), [("000", "png"), ("zzz", "jpg"), ("zzz", "bmp")])
def test_a_truncated_image_is_named(root, name, extension):
    folder = root / "train" / "ant"
    write(root / "spare", 1, (64, 64), extension=extension)
    data = (root / "spare" / f"000.{extension}").read_bytes()
    (folder / f"{name}.{extension}").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=rf"{name}.{extension} cannot be read as an image") as caught:
        ImageFolder(str(root)).setup()
    assert str(caught.value).startswith(str(folder))
    assert str(caught.value).endswith("replace or remove it")


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000)])
def test_a_strip_costs_no_more_than_its_centre(size, monkeypatch):
    sizes, plain = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, to, *a, **o: sizes.append(to) or plain(image, to, *a, **o))
    strip = np.zeros((size[1], size[0], 3), np.uint8)
    strip[1990:2010] = 255
    strip[:, 1990:2010] = 255
    assert (to_square(Image.fromarray(strip), 32) == 255).all()
    assert sizes == [(32, 32)]


def test_a_copy_has_the_same_contents_and_changed_pixels_others(root, tmp_path_factory, monkeypatch):
    copy = tmp_path_factory.mktemp("copy") / "images"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)  # with times of its own
    before = ImageFolder(str(root)).content_key()
    assert ImageFolder(str(copy)).content_key() == before
    first = copy / "train/ant/000.png"
    content = bytearray(first.read_bytes())
    content[-20] ^= 1  # of the same size
    first.write_bytes(content)
    assert ImageFolder(str(copy)).content_key() != before
    monkeypatch.setattr(image_folder, "KEYED_BYTES", 28 * 16)  # 28 images, of each its beginning alone
    assert ImageFolder(str(copy)).content_key() == ImageFolder(str(root)).content_key()
    first.rename(first.with_name("new.png"))
    assert ImageFolder(str(copy)).content_key() != ImageFolder(str(root)).content_key()
