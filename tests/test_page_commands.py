"""The shell blocks of README and docs run as they are printed, page after page in one folder, on a tiny quickstart."""

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "notebooks/docs"
RUN = ("start", "choose", "methods", "method", "networks", "clusters")
"""The pages whose blocks run, in this order: that of clusters trains anew, with larger batches."""
NOT_RUN = {
    "README": "`make demo` and `make test` are what continuous integration runs on a fresh clone",
    "serve": "its servers run until they are stopped: `tests/commands/test_serve.py` starts them",
    "wandb": "it needs an account and the network, or a terminal",
    "hugging-face": "FusionBench is no dependency: `tests/pipeline/test_fusion_bench.py` has its methods",
}

QUICKSTART = """
name: quickstart
network: {name: small_resnet, image_size: 16, options: {width: 4}}
base:
  task: {class_path: Glyphs, init_args: {classes: K-T, train_samples: 200}}
  epochs: 1
  lr: 0.05
tasks:
  mnist: {class_path: Digits, init_args: {max_train: 300, max_test: 77}}
  others: {class_path: Digits, init_args: {max_train: 300, max_test: 77, split_seed: 1}}
expert: {epochs: 4, lr: 0.02, batch_size: 32}
calibration: {samples_per_task: 40, batch_size: 20}
methods:
  - {class_path: Average}
  - {class_path: Refit, init_args: {adapters: {rank: 16}, compress: {bits: 4}}}
decoders: [linear, feature_ridge, expert_head]
"""


def blocks_of(page):
    return re.findall(r"(?s)```bash\n(.*?)```", page.read_text(encoding="utf-8"))


def write_mnist(folder, count):
    """Write a data set of noise where torchvision looks for MNIST's files, so that it downloads nothing."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    for part in ("train", "t10k"):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=draw)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
            content = bytes([0, 0, 8, values.ndim]) + sizes + values.numpy().tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(content)
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))


def run(block, folder):
    """Run a block in a shell in which pip, which would change the environment, does nothing."""
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
    }
    done = subprocess.run(
        ["bash", "-ec", f"pip() {{ :; }}\n{block}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_every_page_with_commands_runs_or_has_a_reason_why_not():
    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    with_commands = {page.stem for page in pages if blocks_of(page)}
    assert with_commands == set(RUN) | set(NOT_RUN)


def test_the_commands_of_the_pages_run_as_printed(tmp_path, write_experts):
    (tmp_path / "quickstart").write_text(QUICKSTART)  # a file of the name comes before coin's own
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    (code,) = re.findall(
        r"(?s)```python\n# mine\.py,.*?\n(.*?)```", (DOCS / "method.md").read_text()
    )
    (tmp_path / "mine.py").write_text(code)
    for name in ("MNIST", "KMNIST"):
        write_mnist(tmp_path / "data" / name / "raw", 300)
    for name, path in zip("AB", write_experts([10, 10]).values(), strict=True):
        (tmp_path / name).mkdir()
        Path(path).rename(tmp_path / name / "expert.safetensors")

    printed = {}
    for page in RUN:
        for block in blocks_of(DOCS / f"{page}.md"):
            printed[page] = printed.get(page, "") + run(block, tmp_path)
        if page == "start":
            experts = tmp_path / "runs/quickstart/seed-0/experts"
            for name, task in (("A", "mnist"), ("B", "others"), ("EXPERT", "mnist")):
                weights = experts / task / "expert.safetensors"
                (tmp_path / f"{name}.safetensors").symlink_to(weights)
            (proposed,) = set(re.findall(r"(?m)^next: (coin .*quickstart .*) says", printed[page]))
            assert "\nKeep " in run(proposed, tmp_path)
            base = tmp_path / "runs/quickstart/base/initial-10.safetensors"
            (tmp_path / "BASE.safetensors").symlink_to(base)
    assert (tmp_path / "SMALL.safetensors").is_file()
    assert "refit+rank16" in printed["choose"]
    assert (tmp_path / "runs/P-200/report.html").is_file()
    assert (tmp_path / "runs/foreign/report.html").is_file()
