import csv
import pickle
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from coin import data
from coin.data import CIFAR10, DTD, GTSRB, MNIST, EuroSAT
from coin.data.tasks import task_with
from coin.errors import DataError

RNG = np.random.default_rng(0)
LIKE_MNIST = ("MNIST", "KMNIST", "FashionMNIST")
TRAINING_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every download of torchvision fails as it does on a machine without network."""

    def fail(*args, **kwargs):
        raise URLError("no\nroute to host")

    for module in ("mnist", "cifar", "svhn", "stl10", "gtsrb", "dtd", "eurosat"):
        for name in ("download_and_extract_archive", "download_url"):
            monkeypatch.setattr(f"torchvision.datasets.{module}.{name}", fail, raising=False)


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write_mnist_like(folder, prefixes=("train", "t10k"), labels=tuple(range(10)) * 2):
    """Write images and labels in MNIST's format; return the last images."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in prefixes:
        images = pixels(len(labels), 28, 28)
        for name, array in (("images-idx3", images), ("labels-idx1", np.array(labels, np.uint8))):
            header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{prefix}-{name}-ubyte").write_bytes(header + array.tobytes())
    return images[:, None]


def write_emnist(root):
    for split in torchvision.datasets.EMNIST.splits:  # torchvision looks for all of them before it reads one
        write_mnist_like(root / "EMNIST/raw", [f"emnist-{split}-{part}" for part in ("train", "test")])
    prefixes = [f"emnist-letters-{part}" for part in ("train", "test")]
    return write_mnist_like(root / "EMNIST/raw", prefixes, tuple(range(1, 27))).transpose(0, 1, 3, 2)


def write_cifar(folder, files, key, classes, meta):
    folder.mkdir(parents=True)
    for name in files:
        images = pixels(classes, 3, 32, 32)
        (folder / name).write_bytes(pickle.dumps({"data": images.reshape(classes, -1), key: list(range(classes))}))
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: ["x"]}))
    return images


def write_cifar10(root):
    meta = ("batches.meta", "label_names")
    return write_cifar(root / "cifar-10-batches-py", [*TRAINING_BATCHES, "test_batch"], "labels", 10, meta)


def write_cifar100(root):
    meta = ("meta", "fine_label_names")
    return write_cifar(root / "cifar-100-python", ["train", "test"], "fine_labels", 100, meta)


def write_svhn(root):
    io = pytest.importorskip("scipy.io")
    for split in ("train", "test"):
        images = pixels(10, 3, 32, 32)
        labels = np.array([10, *range(1, 10)]).reshape(-1, 1)  # 10 stands for the digit 0
        io.savemat(root / f"{split}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": labels})
    return images


def write_stl10(root):
    (root / "stl10_binary").mkdir()
    for split in ("train", "test"):
        images = pixels(10, 3, 96, 96)
        (root / f"stl10_binary/{split}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        (root / f"stl10_binary/{split}_y.bin").write_bytes(bytes(range(1, 11)))
    return images


@pytest.mark.parametrize(
    ("name", "classes", "write"),
    [
        *((name, 10, lambda root, name=name: write_mnist_like(root / name / "raw")) for name in LIKE_MNIST),
        ("EMNISTLetters", 26, write_emnist),
        ("CIFAR10", 10, write_cifar10),
        ("CIFAR100", 100, write_cifar100),
        ("SVHN", 10, write_svhn),
        ("STL10", 10, write_stl10),
    ],
)
def test_raw_files_become_images_and_labels_from_zero(tmp_path, monkeypatch, name, classes, write):
    for module in ("cifar", "svhn", "stl10"):  # the checksums of such tiny files are not the real ones
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: True)
    expected = write(tmp_path)
    task = getattr(data, name)(root=str(tmp_path), validation_share=0.0, download=False)
    images, labels = task.splits.test[:]
    assert torch.equal(images, torch.from_numpy(expected))
    assert labels.tolist() == [*range(classes)] * (len(expected) // classes)
    assert task.num_classes == len(set(task.classes)) == classes
    assert len(task.splits.train) == len(expected) * (5 if name == "CIFAR10" else 1)
    assert task.splits.train[:][0].shape[1:] == expected.shape[1:]


def test_copies_look_for_their_files_once(tmp_path, monkeypatch):
    write_mnist_like(tmp_path / "MNIST/raw")
    opened, real = [], torchvision.datasets.MNIST
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *args, **own: opened.append(1) or real(*args, **own))
    given = MNIST(root=str(tmp_path))
    for task in [task_with(given, seed=seed) for seed in range(3)]:
        task.prepare_data()
        task.setup()
    assert len(opened) == 4


def test_files_of_other_checksums_or_cut_off_are_refused(tmp_path):
    write_cifar10(tmp_path)
    with pytest.raises(DataError, match=r"CIFAR10: there are no usable files in .*cifar-10-batches-py \(.*corrupted"):
        CIFAR10(root=str(tmp_path), download=False).setup()
    write_mnist_like(tmp_path / "MNIST/raw")
    file = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="MNIST: there are no usable files in"):
        MNIST(root=str(tmp_path), download=False).setup()


def picture(path, label, size=(30, 26)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (label % 256, 100, 0)).save(path, quality=95)


def write_gtsrb(root):
    for label in range(43):
        picture(root / f"gtsrb/GTSRB/Training/{label:05}/00000.ppm", label, (20 + label % 3, 25))
        picture(root / f"gtsrb/GTSRB/Final_Test/Images/{label:05}.ppm", label)
    with (root / "gtsrb/GT-final_test.csv").open("w", newline="") as file:
        rows = [["Filename", "ClassId"], *([f"{label:05}.ppm", label] for label in range(43))]
        csv.writer(file, delimiter=";").writerows(rows)


def write_dtd(root):
    names = [f"texture{label:02}" for label in range(47)]
    (root / "dtd/dtd/labels").mkdir(parents=True)
    for split in ("train", "val", "test"):
        for label, name in enumerate(names):
            picture(root / f"dtd/dtd/images/{name}/{split}.jpg", label)
        (root / f"dtd/dtd/labels/{split}1.txt").write_text("\n".join(f"{name}/{split}.jpg" for name in names))


def write_eurosat(root):
    for label, number in ((label, number) for label in range(10) for number in range(10)):
        picture(root / f"eurosat/2750/land{label}/{number}.jpg", label, (24, 24))


@pytest.mark.parametrize(
    ("task_class", "write", "sizes"),
    [
        (GTSRB, write_gtsrb, (43, 0, 43)),
        (DTD, write_dtd, (47, 47, 47)),
        (EuroSAT, write_eurosat, (80, 0, 20)),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_sets_of_image_files(tmp_path, task_class, write, sizes):
    write(tmp_path)
    task = task_class(root=str(tmp_path), image_size=24, validation_share=0.0)
    task.prepare_data()
    splits = task.splits
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [*sizes]
    images, labels = splits.test[:]
    assert images.shape[1:] == (3, 24, 24)
    assert int((images[:, 0, 12, 12].int() - labels % 256).abs().max()) <= 3
    assert {*labels.tolist(), *splits.train.targets.tolist()} == set(range(task.num_classes))


def test_a_damaged_image_is_an_error(tmp_path):
    write_gtsrb(tmp_path)
    (tmp_path / "gtsrb/GTSRB/Training/00003/00000.ppm").write_bytes(b"P6 oh")
    with pytest.raises(DataError, match=r"GTSRB: there are no usable files in .*gtsrb \(invalid literal"):
        GTSRB(root=str(tmp_path), download=False).setup()


@pytest.mark.parametrize(
    "name",
    [*("MNIST", "EMNISTLetters", "SVHN", "CIFAR10", "CIFAR100", "STL10"), *("GTSRB", "DTD", "EuroSAT", "KMNIST")],
)
def test_missing_files_are_one_line_with_path_and_way_out_and_nothing_is_substituted(tmp_path, name):
    task_class = getattr(data, name)
    place = tmp_path / task_class.folder
    with pytest.raises(DataError, match=f"^{name}: the download failed and .*set download: false") as caught:
        task_class(root=str(tmp_path)).prepare_data()
    assert "\n" not in str(caught.value)
    assert "route to host" in str(caught.value)
    assert str(place) in str(caught.value)
    task = task_class(root=str(tmp_path), download=False)
    for read in (task.prepare_data, task.setup):
        with pytest.raises(DataError, match=f"{name}: there are no usable files in {place}"):
            read()
