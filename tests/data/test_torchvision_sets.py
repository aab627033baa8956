"""Torchvision's sets, read from tiny files in their own formats."""

from urllib.error import URLError

import pytest
import torch
from PIL import Image
from torchvision.datasets import EMNIST

from coin import data
from coin.data import DTD, GTSRB, MNIST, EMNISTLetters, EuroSAT
from coin.data.tasks import task_with
from coin.errors import DataError
from tests.data.conftest import write_mnist_like

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

    monkeypatch.setattr("urllib.request.urlopen", fail)


def write_mnist(root):
    return write_mnist_like(root / "MNIST/raw")


def write_emnist(root):
    for split in EMNIST.splits:  # torchvision looks for all of them before it reads one
        prefixes = [f"emnist-{split}-train", f"emnist-{split}-test"]
        images = write_mnist_like(root / "EMNIST/raw", prefixes, first=1, classes=26)
    return images.mT  # EMNIST stores them transposed


@pytest.mark.parametrize(("kind", "write"), [(MNIST, write_mnist), (EMNISTLetters, write_emnist)])
def test_raw_files_become_upright_images_and_labels_from_zero(tmp_path, kind, write):
    expected = write(tmp_path)
    task = kind(root=str(tmp_path), validation_share=0.0, download=False)
    for of_split, part in zip(expected, (task.splits.train, task.splits.test), strict=True):
        images, labels = part[:]
        assert torch.equal(images, of_split)
        assert labels.tolist() == [*range(task.num_classes)]


def test_copies_look_for_their_files_once(tmp_path):
    write_mnist(tmp_path)
    given = MNIST(root=str(tmp_path))
    given.prepare_data()
    splits = given.splits
    (tmp_path / "MNIST").rename(tmp_path / "gone")
    copy = task_with(given, seed=1)
    copy.prepare_data()
    assert copy.splits is splits


TRAIN, TEST, VALIDATION = 0, 100, 200
"""The green of pictures of a split; their red is the label."""


def picture(path, label, split, size=(30, 26)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (label, split, 0)).save(path, quality=95)


def write_gtsrb(root):
    rows = ["Filename;ClassId"]
    for label in range(43):
        train = root / f"gtsrb/GTSRB/Training/{label:05}/00000.ppm"
        picture(train, label, TRAIN, (20 + label % 3, 25))
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


@pytest.mark.parametrize(
    ("kind", "write", "splits"),
    [
        (GTSRB, write_gtsrb, {"train": TRAIN, "test": TEST}),
        (DTD, write_dtd, {"train": TRAIN, "test": TEST, "validation": VALIDATION}),
    ],
)
def test_photographs_are_squares_in_the_size_of_the_inputs(tmp_path, kind, write, splits):
    write(tmp_path)
    task = kind(root=str(tmp_path), image_size=24, validation_share=0.0)
    for split, green in splits.items():
        images, labels = getattr(task.splits, split)[:]
        assert images.shape == (task.num_classes, 3, 24, 24)
        assert labels.sort().values.tolist() == list(range(task.num_classes))
        centre = images[:, :2, 12, 12].int()  # [B, 2]: red and green
        expected = torch.stack([labels, torch.full_like(labels, green)], 1)
        assert (centre - expected).abs().max() <= 3  # of JPEG


@pytest.mark.parametrize(("image_size", "side"), [(24, 24), (224, 64)])
def test_satellite_images_are_split_evenly_and_not_enlarged(tmp_path, image_size, side):
    for number in range(100):
        land = tmp_path / f"eurosat/2750/land{number % 10}"
        picture(land / f"{number}.jpg", number, TRAIN, (64, 64))
    task = EuroSAT(root=str(tmp_path), image_size=image_size, validation_share=0.0)
    images, labels = task.splits.test[:]
    assert images.shape == (20, 3, side, side)
    assert labels.bincount().tolist() == [2] * 10
    assert len(task.splits.train) == 80


@pytest.mark.parametrize(
    ("kind", "write", "file", "message"),
    [
        (MNIST, write_mnist, "MNIST/raw/train-images-idx3-ubyte", "MNIST: .* files in .*raw"),
        (
            GTSRB,
            write_gtsrb,
            "gtsrb/GTSRB/Training/00003/00000.ppm",
            r"GTSRB: .* files in .*gtsrb \(invalid literal",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, kind, write, file, message):
    write(tmp_path)
    (tmp_path / file).write_bytes(b"P6 oh")
    with pytest.raises(DataError, match=message):
        kind(root=str(tmp_path), download=False).setup()


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
