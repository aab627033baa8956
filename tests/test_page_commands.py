"""The shell blocks of README and docs run as they are printed, page after page in one folder, on a tiny quickstart."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.conftest import write_mnist_like
from tests.test_readme import DOCS, README, ROOT, shell_blocks_of, write_files_of

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
    with_commands = {page.stem for page in [README, *DOCS] if shell_blocks_of(page)}
    assert with_commands == set(RUN) | set(NOT_RUN)


@pytest.mark.slow
def test_the_commands_of_the_pages_run_as_printed(tmp_path, write_experts):
    pages = {page.stem: page for page in DOCS}
    (tmp_path / "quickstart").write_text(QUICKSTART)  # a file of the name comes before coin's own
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    write_files_of(pages["method"], tmp_path)
    for name in ("MNIST", "KMNIST"):  # where they would be downloaded to
        write_mnist_like(tmp_path / "data" / name / "raw", each=30)
    for name, path in zip("AB", write_experts([10, 10]).values(), strict=True):
        (tmp_path / name).mkdir()
        Path(path).rename(tmp_path / name / "expert.safetensors")

    printed = {}
    for page in RUN:
        for block in shell_blocks_of(pages[page]):
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
