"""``coin run`` at its limits: one calibration sample a task, experts that are no numbers, a solve that ends early."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from coin.cli import main
from coin.files.safetensors import load_state
from coin.networks import load_network
from coin.reporting import read_results

pytestmark = pytest.mark.slow

METHODS = ["Average", "Coin", "RegMean", "HeadFit"]
DISTILLATION = {"class_path": "Distillation", "init_args": {"steps": 3, "lr": 1e-3}}


@pytest.mark.usefixtures("no_reports")
def test_two_samples_a_task_serve_every_method_and_decoder(
    run_small: Callable[..., Path], trained: dict[str, Any]
) -> None:
    methods = [*({"class_path": name} for name in METHODS), DISTILLATION]
    methods.append({"class_path": "Average", "init_args": {"batchnorm": "recalibrate"}})
    seed = run_small(**trained, methods=methods, calibration={"samples_per_task": 2})
    coded = sorted((seed / "coded").glob("*.safetensors"))
    assert len(coded) == 6
    for path in coded:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_state(path)[0].values()), (
            path.name
        )
    frame = read_results(seed)
    assert frame.decoded_accuracy.notna().all()
    assert len(frame) == 6 * 3 * 2 + 2 * 2 + 2


FAILURES = {
    "a BatchNorm policy chosen on two samples": (
        ["--calibration.samples_per_task=1"],
        "found 2 calibration samples in all, expected at least 3 to choose a BatchNorm policy",
    ),
    "a rate chosen on two samples": (
        ["--methods=[{class_path: Distillation}]", "--calibration.samples_per_task=1"],
        "found 1 calibration samples, expected",
    ),
    "a distillation that diverges": (
        ["--methods=[{class_path: Distillation, init_args: {steps: 5, lr: 1.0e+30}}]"],
        "distillation diverged with lr=1e+30",
    ),
    "a singular Gram matrix": (
        ["--methods=[{class_path: RegMean, init_args: {alpha: 1, damping: 0}}]"],
        "singular with a damping of 0; raise the method's damping",
    ),
    "an expert that diverges": (
        ["--expert.lr=1.0e+30", "--expert.checkpoints={}"],
        "training diverged",
    ),
    "an expert with a NaN": (
        ["--expert.checkpoints.digits=nan.pt"],
        "nan.pt' is not finite: tensor 'fc.bias' holds a NaN",
    ),
    "a base with a NaN": (
        ["--base.checkpoint=nan.pt"],
        "nan.pt' is not finite: tensor 'fc.bias' holds a NaN",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_cannot_work_is_one_line_and_writes_no_network(
    case: str,
    config: Path,
    trained: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = load_network(Path(trained["expert"]["checkpoints"]["digits"])).network.state_dict()
    state["fc.bias"][0] = torch.nan
    torch.save(state, "nan.pt")
    options, message = FAILURES[case]
    methods = [{"class_path": "Average"}]
    document = (
        yaml.safe_load(config.read_text()) | trained | {"methods": methods, "name": "damaged"}
    )
    Path("one.yaml").write_text(json.dumps(document | {"calibration": {"samples_per_task": 2}}))
    assert main(["run", "-c", "one.yaml", f"--output={tmp_path}", *options]) == 2
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert line.startswith("coin: error: ")
    assert message in line
    assert "Traceback" not in error
    assert not list((tmp_path / "damaged").rglob("coded/*.safetensors"))
