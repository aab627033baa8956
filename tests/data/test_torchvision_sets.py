import csv
import pickle
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from coin.data import (
    CIFAR10,
    CIFAR100,
    DTD,
    GTSRB,
    KMNIST,
    MNIST,
    STL10,
    SUN397,
    SVHN,
    EMNISTLetters,
    EuroSAT,
    FashionMNIST,
    StanfordCars,
)
from coin.data.tasks import task_with
from coin.errors import DataError

ALL = (MNIST, FashionMNIST, KMNIST, EMNISTLetters, SVHN, CIFAR10, CIFAR100, GTSRB, STL10, DTD, EuroSAT)
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every download of torchvision fails as it does on a machine without network."""

    def fail(*args, **kwargs):
        raise URLError("no\nroute to host")

    for module in ("mnist", "cifar", "svhn", "stl10", "gtsrb", "dtd", "eurosat", "sun397"):
        for name in ("download_and_extract_archive", "download_url"):
            if hasattr(getattr(torchvision.datasets, module), name):
                monkeypatch.setattr(f"torchvision.datasets.{module}.{name}", fail)


@pytest.fixture
def no_checksums(monkeypatch):
    """Accept the tests' own tiny files, whose checksums are not the real ones."""
    for module in ("cifar", "svhn", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: True)


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist_like(folder, prefixes=("train", "t10k"), labels=tuple(range(10)) * 2):
    written = []
    for prefix in prefixes:
        images = pixels(len(labels), 28, 28)
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.array(labels))
        written.append(images)
    return written


@pytest.mark.parametrize("task_class", [MNIST, FashionMNIST, KMNIST])
def test_sets_in_mnists_format(tmp_path, task_class):
    train, test = write_mnist_like(tmp_path / task_class.__name__ / "raw")
    task = task_class(root=str(tmp_path), validation_share=0.0)
    task.prepare_data()
    task.setup()
    assert torch.equal(task.splits.train.images(), torch.from_numpy(train).unsqueeze(1))
    assert torch.equal(task.splits.test.images(), torch.from_numpy(test).unsqueeze(1))
    assert task.splits.test.targets.tolist() == list(range(10)) * 2
    assert task.num_classes == 10


def test_copies_look_for_their_files_once(tmp_path, monkeypatch):
    write_mnist_like(tmp_path / "MNIST" / "raw")
    opened, real = [], torchvision.datasets.MNIST
    monkeypatch.setattr(
        torchvision.datasets, "MNIST", lambda *args, **options: opened.append(1) or real(*args, **options)
    )
    given = MNIST(root=str(tmp_path))
    copies = [task_with(given, seed=seed) for seed in range(3)]
    for task in copies:
        task.prepare_data()
        task.setup()
    assert len(opened) == 4


def test_emnist_letters_are_upright_and_counted_from_zero(tmp_path):
    prefixes = [f"emnist-letters-{part}" for part in ("train", "test")]
    # torchvision looks for all of EMNIST's splits before it reads one of them.
    for split in torchvision.datasets.EMNIST.splits:
        write_mnist_like(tmp_path / "EMNIST" / "raw", [f"emnist-{split}-{part}" for part in ("train", "test")])
    _, test = write_mnist_like(tmp_path / "EMNIST" / "raw", prefixes, tuple(range(1, 27)))
    task = EMNISTLetters(root=str(tmp_path), download=False)
    assert torch.equal(task.splits.test.images()[:, 0], torch.from_numpy(test).transpose(1, 2))
    assert task.splits.test.targets.tolist() == list(range(26))
    assert (task.classes[0], task.classes[-1], task.num_classes) == ("a", "z", 26)


def write_cifar(folder, train_files, test_files, key, classes, meta, meta_key, names):
    folder.mkdir(parents=True)
    written = {}
    for name in (*train_files, *test_files):
        images = pixels(classes, 3, 32, 32)
        entry = {"data": images.reshape(classes, -1), key: list(range(classes))}
        (folder / name).write_bytes(pickle.dumps(entry))
        written[name] = images
    (folder / meta).write_bytes(pickle.dumps({meta_key: list(names)}))
    return written


@pytest.mark.usefixtures("no_checksums")
def test_cifar10_reads_torchvisions_raw_files(tmp_path):
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    folder = tmp_path / "cifar-10-batches-py"
    written = write_cifar(folder, batches, ["test_batch"], "labels", 10, "batches.meta", "label_names", CIFAR10.names)
    task = CIFAR10(root=str(tmp_path), download=False, validation_share=0.0)
    expected = np.concatenate([written[name] for name in batches])
    assert torch.equal(task.splits.train.images(), torch.from_numpy(expected))
    assert torch.equal(task.splits.test.images(), torch.from_numpy(written["test_batch"]))
    assert task.splits.test.targets.tolist() == list(range(10))


@pytest.mark.usefixtures("no_checksums")
def test_cifar100(tmp_path):
    written = write_cifar(
        tmp_path / "cifar-100-python", ["train"], ["test"], "fine_labels", 100, "meta", "fine_label_names", "x"
    )
    task = CIFAR100(root=str(tmp_path), download=False)
    assert torch.equal(task.splits.test.images(), torch.from_numpy(written["test"]))
    assert task.num_classes == len(set(task.classes)) == 100
    assert task.splits.test.targets.tolist() == list(range(100))
    assert list(task.classes) == sorted(task.classes)


def test_cifar_with_other_checksums_is_refused(tmp_path):
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder, batches, ["test_batch"], "labels", 10, "batches.meta", "label_names", CIFAR10.names)
    with pytest.raises(DataError, match=r"CIFAR10: there are no usable files in .*cifar-10-batches-py \(.*corrupted"):
        CIFAR10(root=str(tmp_path), download=False).setup()


@pytest.mark.usefixtures("no_checksums")
def test_svhn(tmp_path):
    io = pytest.importorskip("scipy.io")
    written = {}
    for split in ("train", "test"):
        written[split] = pixels(20, 3, 32, 32)
        labels = np.array([*range(1, 11)] * 2).reshape(-1, 1)
        io.savemat(tmp_path / f"{split}_32x32.mat", {"X": written[split].transpose(2, 3, 1, 0), "y": labels})
    task = SVHN(root=str(tmp_path), download=False)
    assert torch.equal(task.splits.test.images(), torch.from_numpy(written["test"]))
    assert task.splits.test.targets.tolist() == [*range(1, 10), 0] * 2


@pytest.mark.usefixtures("no_checksums")
def test_stl10(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = pixels(10, 3, 96, 96)
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(range(1, 11)))
    task = STL10(root=str(tmp_path), download=False)
    assert torch.equal(task.splits.test.images(), torch.from_numpy(images))
    assert task.splits.test.targets.tolist() == list(range(10))


def write_gtsrb(root):
    base = root / "gtsrb"
    test = base / "GTSRB" / "Final_Test" / "Images"
    test.mkdir(parents=True)
    for label in range(43):
        folder = base / "GTSRB" / "Training" / f"{label:05}"
        folder.mkdir(parents=True)
        colour = np.array([5 * label, 100, 0], dtype=np.uint8)
        Image.fromarray(np.broadcast_to(colour, (20 + label % 3, 25, 3)).copy()).save(folder / "00000.ppm")
        Image.fromarray(np.broadcast_to(colour, (30, 28, 3)).copy()).save(test / f"{label:05}.ppm")
    with (base / "GT-final_test.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["Filename", "ClassId"])
        writer.writerows([f"{label:05}.ppm", label] for label in range(43))
    return base


def test_gtsrb_is_resized_when_it_is_read(tmp_path):
    write_gtsrb(tmp_path)
    task = GTSRB(root=str(tmp_path), image_size=24, validation_share=0.0)
    task.prepare_data()
    for part in (task.splits.train, task.splits.test):
        images = part.images()
        assert images.shape == (43, 3, 24, 24)
        assert images[:, 0, 3, 3].tolist() == [5 * label for label in part.targets.tolist()]
    assert task.num_classes == 43


def test_a_damaged_gtsrb_image_is_an_error(tmp_path):
    base = write_gtsrb(tmp_path)
    (base / "GTSRB" / "Training" / "00003" / "00000.ppm").write_bytes(b"P6 oh")
    with pytest.raises(DataError, match=r"GTSRB in .*gtsrb is damaged .*; delete it to download it again"):
        GTSRB(root=str(tmp_path), download=False).setup()


def picture(path, label, size=(30, 26)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (label % 256, 100, 0)).save(path, quality=95)


def write_dtd(root):
    names = [f"texture{label:02}" for label in range(47)]
    for name, split in ((name, split) for name in names for split in ("train", "val", "test")):
        picture(root / f"dtd/dtd/images/{name}/{split}.jpg", names.index(name))
    (root / "dtd/dtd/labels").mkdir()
    for split in ("train", "val", "test"):
        lines = "\n".join(f"{name}/{split}.jpg" for name in names)
        (root / f"dtd/dtd/labels/{split}1.txt").write_text(lines)


def write_eurosat(root):
    for label, number in ((label, number) for label in range(10) for number in range(10)):
        picture(root / f"eurosat/2750/land{label}/{number}.jpg", label, (24, 24))


def write_cars(root):
    io = pytest.importorskip("scipy.io")
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    files = {"train": base / "devkit/cars_train_annos.mat", "test": base / "cars_test_annos_withlabels.mat"}
    for split, file in files.items():
        kinds = [("class", int), ("fname", object)]
        rows = np.array([(label + 1, f"{label:05}.jpg") for label in range(196)], dtype=kinds)
        io.savemat(file, {"annotations": rows})
        for label in range(196):
            picture(base / f"cars_{split}/{label:05}.jpg", label)
    io.savemat(
        base / "devkit/cars_meta.mat", {"class_names": np.array([f"car {label}" for label in range(196)], object)}
    )


def write_sun397(root):
    names = [f"/p/place{label:03}/{'in' if label % 2 else 'out'}door" for label in range(397)]
    for label, name in enumerate(names):
        for number in range(5):
            picture(root / f"SUN397{name}/sun_{number}.jpg", label)
    (root / "SUN397/ClassName.txt").write_text("\n".join(names))


@pytest.mark.parametrize(
    ("task_class", "write", "sizes"),
    [
        (DTD, write_dtd, (47, 47, 47)),
        (EuroSAT, write_eurosat, (80, None, 20)),
        (StanfordCars, write_cars, (196, None, 196)),
        (SUN397, write_sun397, (397 * 4, None, 397)),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_sets_of_image_files(tmp_path, task_class, write, sizes, monkeypatch):
    write(tmp_path)
    for most in (2**30, 0):  # in memory, and read when needed
        monkeypatch.setattr("coin.data.torchvision_sets.IN_MEMORY", most)
        task = task_class(root=str(tmp_path), image_size=24, validation_share=0.0)
        task.check_files()
        task.prepare_data()
        splits = task.splits
        assert [len(splits.train), splits.validation and len(splits.validation), len(splits.test)] == [*sizes]
        assert splits.train.in_memory == (most > 0)
        images, labels = splits.test.images(), splits.test.targets
        assert images.shape[1:] == (3, 24, 24)
        assert int((images[:, 0, 12, 12].int() - labels % 256).abs().max()) <= 3
        assert set(labels.tolist()) == set(range(task.num_classes))


@pytest.mark.parametrize("task_class", ALL)
def test_missing_files_are_one_line_with_path_and_way_out_and_nothing_is_substituted(tmp_path, task_class):
    name, place = task_class.__name__, tmp_path / task_class.folder
    with pytest.raises(DataError) as caught:
        task_class(root=str(tmp_path)).prepare_data()
    message = str(caught.value)
    assert message.startswith(f"{name}: the download failed and ")
    assert "\n" not in message
    for part in ("route to host", str(place), "set download: false"):
        assert part in message
    task = task_class(root=str(tmp_path), download=False)
    task.prepare_data()
    for read in (task.check_files, task.setup):
        with pytest.raises(DataError, match=f"{name}: there are no usable files in {place}"):
            read()
    assert task.num_classes >= 10


def test_a_truncated_file_is_an_error(tmp_path):
    write_mnist_like(tmp_path / "MNIST" / "raw")
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="MNIST: there are no usable files in"):
        MNIST(root=str(tmp_path), download=False).setup()
