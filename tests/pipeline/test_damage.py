"""``coin run`` at its limits: one calibration sample a task, experts that are no numbers, a solve that ends early."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coin.cli import main
from coin.files.safetensors import load_state
from coin.networks import load_network
from coin.reporting import read_results

pytestmark = pytest.mark.slow

CONFIG = """
network: {name: small_resnet, image_size: 16, options: {width: 4}}
tasks:
  digits: {class_path: Digits, init_args: {max_train: 120, max_test: 40}}
  letters: {class_path: Glyphs, init_args: {classes: A-F, train_per_class: 30, test_per_class: 9}}
expert: {epochs: 1, lr: 0.02, batch_size: 32}
calibration: {samples_per_task: 1}
decoders: [linear, ridge, feature_ridge]
seeds: [0]
methods:
  - {class_path: Average}
  - {class_path: Average, init_args: {batchnorm: recalibrate}}
  - {class_path: Coin}
  - {class_path: RegMean}
  - {class_path: HeadFit}
  - {class_path: TaskArithmetic}
  - {class_path: Ties}
  - {class_path: Distillation, init_args: {steps: 3, lr: 1.0e-3}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "one.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def folder(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the experts that the other tests bring along."""
    output = tmp_path_factory.mktemp("runs")
    arguments = ["run", "-c", str(config), f"--output={output}", "--name=experts", "--methods=[{class_path: Average}]"]
    assert main(arguments) == 0
    return output / "experts/seed-0"


def bring(folder: Path, **other: Path) -> str:
    paths = {task: folder / "experts" / task / "expert.safetensors" for task in ("digits", "letters")} | other
    return "--expert.checkpoints={" + ", ".join(f"{task}: {path}" for task, path in paths.items()) + "}"


@pytest.mark.usefixtures("no_reports")
def test_one_sample_a_task_serves_every_method_and_decoder(config: Path, folder: Path, tmp_path: Path) -> None:
    assert main(["run", "-c", str(config), f"--output={tmp_path}", "--name=one", bring(folder)]) == 0
    coded = sorted((tmp_path / "one/seed-0/coded").glob("*.safetensors"))
    assert len(coded) == 8
    for path in coded:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_state(path)[0].values()), path.name
    frame = read_results(tmp_path / "one/seed-0")
    assert frame.decoded_accuracy.notna().all()
    assert len(frame) == 8 * 3 * 2 + 2 * 2 + 2


def test_a_warning_is_one_readable_line(config: Path, folder: Path, tmp_path: Path) -> None:
    hasty = "--methods=[{class_path: RegMean, init_args: {batchnorm: average, damping: null}}]"
    arguments = ["run", "-c", str(config), f"--output={tmp_path}", "--name=hasty", bring(folder), hasty]
    done = subprocess.run(
        [sys.executable, "-m", "coin", *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    (line,) = (line for line in done.stderr.splitlines() if "chose" in line or "warn(" in line)
    assert line.startswith("coin: warning: method 'regmean' chose by ")
    assert "expected at least 10" in line


FAILURES = {
    "a rate chosen on two samples": (
        ["--methods=[{class_path: Distillation}]"],
        "1 training samples over 1 process(es); each needs at least 2 of them",
    ),
    "a distillation that diverges": (
        ["--methods=[{class_path: Distillation, init_args: {steps: 5, lr: 1.0e+30}}]"],
        "distillation diverged with lr=1e+30",
    ),
    "a singular Gram matrix": (
        ["--methods=[{class_path: RegMean, init_args: {alpha: 1, damping: 0}}]"],
        "singular with a damping of 0; raise the method's damping",
    ),
    "an expert that diverges": (["--expert.lr=1.0e+30", "--expert.checkpoints={}"], "training diverged"),
    "an expert with a NaN": (["NAN"], "nan.pt' is not finite: tensor 'fc.bias' holds a NaN"),
    "a base with a NaN": (["--base.checkpoint=nan.pt"], "nan.pt' is not finite: tensor 'fc.bias' holds a NaN"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_cannot_work_is_one_line_and_writes_no_network(
    case: str, config: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_network(folder / "experts/digits/expert.safetensors").network.state_dict()
    state["fc.bias"][0] = torch.nan
    torch.save(state, "nan.pt")
    extra, message = FAILURES[case]
    arguments = [bring(folder, digits=Path("nan.pt")) if argument == "NAN" else argument for argument in extra]
    brought = [] if "NAN" in extra else [bring(folder)]
    assert main(["run", "-c", str(config), f"--output={tmp_path}", "--name=damaged", *brought, *arguments]) == 2
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert line.startswith("coin: error: ")
    assert message in line
    assert "Traceback" not in error
    assert not list((tmp_path / "damaged").rglob("coded/*.safetensors"))
