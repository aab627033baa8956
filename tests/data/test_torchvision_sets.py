"""Torchvision's sets, read from tiny files in their own formats."""

import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from coin import data
from coin.data import DTD, GTSRB, MNIST, EMNISTLetters, EuroSAT
from coin.data.tasks import task_with
from coin.errors import DataError

MODULES = ("mnist", "cifar", "svhn", "stl10", "gtsrb", "dtd", "eurosat")
CLASSES = {
    "MNIST": 10,
    "KMNIST": 10,
    "FashionMNIST": 10,
    "EMNISTLetters": 26,
    "SVHN": 10,
    "CIFAR10": 10,
    "CIFAR100": 100,
    "STL10": 10,
    "GTSRB": 43,
    "DTD": 47,
    "EuroSAT": 10,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every download of torchvision fails as it does on a machine without network."""

    def fail(*args, **options):
        raise URLError("no\nroute to host")

    for module in MODULES:
        for name in ("download_and_extract_archive", "download_url"):
            monkeypatch.setattr(f"torchvision.datasets.{module}.{name}", fail, raising=False)


def write_mnist_like(folder, prefixes=("train", "t10k"), first=0, classes=10):
    """Write an image of each class to train and to test on in MNIST's format, and return the images."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (2, classes, 28, 28), dtype=np.uint8)
    labels = np.arange(first, first + classes, dtype=np.uint8)
    sizes = struct.pack(">II", 28, 28)
    for prefix, of_split in zip(prefixes, images, strict=True):
        header = struct.pack(">HBBI", 0, 8, 3, classes) + sizes
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + of_split.tobytes())
        header = struct.pack(">HBBI", 0, 8, 1, classes)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return images[:, :, None]


def write_mnist(root):
    return write_mnist_like(root / "MNIST/raw")


def write_emnist(root):
    folder = root / "EMNIST/raw"
    for split in (
        torchvision.datasets.EMNIST.splits
    ):  # torchvision looks for all of them before it reads one
        prefixes = [f"emnist-{split}-train", f"emnist-{split}-test"]
        images = write_mnist_like(folder, prefixes, first=1, classes=26)
    return images.swapaxes(-1, -2)  # EMNIST stores them transposed


@pytest.mark.parametrize(("kind", "write"), [(MNIST, write_mnist), (EMNISTLetters, write_emnist)])
def test_raw_files_become_upright_images_and_labels_from_zero(tmp_path, kind, write):
    expected = write(tmp_path)
    task = kind(root=str(tmp_path), validation_share=0.0, download=False)
    for of_split, part in zip(expected, (task.splits.train, task.splits.test), strict=True):
        images, labels = part[:]
        assert torch.equal(images, torch.from_numpy(of_split))
        assert labels.tolist() == [*range(task.num_classes)]


def test_copies_look_for_their_files_once(tmp_path):
    write_mnist(tmp_path)
    given = MNIST(root=str(tmp_path))
    given.prepare_data()
    splits = given.splits
    (tmp_path / "MNIST").rename(tmp_path / "gone")
    for seed in range(3):
        task = task_with(given, seed=seed)
        task.prepare_data()
        assert task.splits is splits


def test_files_that_are_cut_off_are_refused(tmp_path):
    write_mnist(tmp_path)
    file = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="MNIST: there are no usable files in"):
        MNIST(root=str(tmp_path), download=False).setup()


TRAIN, TEST, VALIDATION = 0, 100, 200
"""The green of pictures of a split; their red is the label."""


def picture(path, label, split, size=(30, 26)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (label, split, 0)).save(path, quality=95)


def write_gtsrb(root):
    rows = ["Filename;ClassId"]
    for label in range(43):
        picture(
            root / f"gtsrb/GTSRB/Training/{label:05}/00000.ppm", label, TRAIN, (20 + label % 3, 25)
        )
        picture(root / f"gtsrb/GTSRB/Final_Test/Images/{label:05}.ppm", label, TEST)
        rows.append(f"{label:05}.ppm;{label}")
    (root / "gtsrb/GT-final_test.csv").write_text("\n".join(rows))


def write_dtd(root):
    folder = root / "dtd/dtd"
    (folder / "labels").mkdir(parents=True)
    for split, green in (("train", TRAIN), ("val", VALIDATION), ("test", TEST)):
        files = [f"texture{label:02}/{split}.jpg" for label in range(47)]
        for label, file in enumerate(files):
            picture(folder / "images" / file, label, green)
        (folder / f"labels/{split}1.txt").write_text("\n".join(files))


def check(part, classes, green):
    """Compare a split's images with what was written of it."""
    images, labels = part[:]
    assert images.shape == (classes, 3, 24, 24)
    assert labels.sort().values.tolist() == list(range(classes))
    centre = images[:, :2, 12, 12].int()  # [B, 2]: red and green
    expected = torch.stack([labels, torch.full_like(labels, green)], 1)
    assert (centre - expected).abs().max() <= 3  # of JPEG


def test_traffic_signs_are_squares_in_the_size_of_the_inputs(tmp_path):
    write_gtsrb(tmp_path)
    task = GTSRB(root=str(tmp_path), image_size=24, validation_share=0.0)
    check(task.splits.train, 43, TRAIN)
    check(task.splits.test, 43, TEST)


def test_textures_have_a_split_for_validation(tmp_path):
    write_dtd(tmp_path)
    task = DTD(root=str(tmp_path), image_size=24)
    for part, green in zip(task.splits, (TRAIN, TEST, VALIDATION), strict=True):
        check(part, 47, green)


def write_eurosat(root):
    for label in range(10):
        for number in range(10):
            picture(root / f"eurosat/2750/land{label}/{number}.jpg", label, TRAIN, (64, 64))


@pytest.mark.parametrize(("image_size", "side"), [(24, 24), (224, 64)])
def test_satellite_images_are_split_evenly_and_not_enlarged(tmp_path, image_size, side):
    write_eurosat(tmp_path)
    task = EuroSAT(root=str(tmp_path), image_size=image_size, validation_share=0.0)
    images, labels = task.splits.test[:]
    assert images.shape == (20, 3, side, side)
    assert labels.bincount().tolist() == [2] * 10
    assert len(task.splits.train) == 80


def test_a_damaged_image_is_an_error(tmp_path):
    write_gtsrb(tmp_path)
    (tmp_path / "gtsrb/GTSRB/Training/00003/00000.ppm").write_bytes(b"P6 oh")
    with pytest.raises(
        DataError, match=r"GTSRB: there are no usable files in .*gtsrb \(invalid literal"
    ):
        GTSRB(root=str(tmp_path), download=False).setup()


@pytest.mark.parametrize("name", CLASSES)
def test_missing_files_are_one_line_with_path_and_way_out_and_nothing_is_substituted(
    tmp_path, name
):
    kind = getattr(data, name)
    place = tmp_path / kind.folder
    message = rf"^{name}: the download failed .* {place} .*route to host.*set download: false"
    with pytest.raises(DataError, match=message) as caught:
        kind(root=str(tmp_path)).prepare_data()
    assert "\n" not in str(caught.value)
    task = kind(root=str(tmp_path), download=False)
    assert len(set(task.classes)) == CLASSES[name]
    for read in (task.prepare_data, task.setup):
        with pytest.raises(DataError, match=f"{name}: there are no usable files in {place}"):
            read()
