"""``coin run`` at its limits: two calibration samples a task, experts that are no numbers, a solve that ends early."""

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

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_reports")]

METHODS = [
    *({"class_path": name} for name in ("Average", "Coin", "RegMean", "HeadFit")),
    {"class_path": "Distillation", "init_args": {"steps": 3, "lr": 1e-3}},
]


def test_two_samples_a_task_serve_every_method_and_decoder(
    run_small: Callable[..., Path], trained: dict[str, Any]
) -> None:
    seed = run_small(**trained, methods=METHODS, calibration={"samples_per_task": 2})
    coded = list((seed / "coded").glob("*.safetensors"))
    assert len(coded) == len(METHODS)
    for path in coded:
        state, _ = load_state(path)
        assert all(bool(tensor.isfinite().all()) for tensor in state.values()), path.name
    frame = read_results(seed)
    assert frame["decoded_accuracy"].notna().all()
    assert len(frame) == len(METHODS) * 3 * 2 + 2 * 2 + 2


DISTILLATION = "--methods=[{class_path: Distillation, init_args: {steps: 5, lr: 1.0e+30}}]"
REGMEAN = "--methods=[{class_path: RegMean, init_args: {alpha: 1, damping: 0}}]"
FAILURES = {
    "found 2 calibration samples in all, expected at least 3 to choose a BatchNorm policy": [
        "--calibration.samples_per_task=1"
    ],
    "found 1 calibration samples, expected": [
        "--methods=[{class_path: Distillation}]",
        "--calibration.samples_per_task=1",
    ],
    "distillation diverged with lr=1e+30": [DISTILLATION],
    "singular with a damping of 0; raise the method's damping": [REGMEAN],
    "training diverged": ["--expert.lr=1.0e+30", "--expert.checkpoints={}"],
    "nan.pt' is not finite: tensor 'fc.bias' holds a NaN": ["--expert.checkpoints.digits=nan.pt"],
    "tensor 'fc.bias' holds a NaN": ["--base.checkpoint=nan.pt"],
}


@pytest.mark.parametrize("expected", FAILURES)
def test_what_cannot_work_is_one_line_and_writes_no_network(
    expected: str,
    config: Path,
    trained: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    digits = load_network(Path(trained["expert"]["checkpoints"]["digits"]))
    state = digits.network.state_dict()
    state["fc.bias"][0] = torch.nan
    torch.save(state, "nan.pt")
    document = yaml.safe_load(config.read_text()) | trained
    document |= {"methods": [{"class_path": "Average"}], "calibration": {"samples_per_task": 2}}
    Path("one.yaml").write_text(json.dumps(document))
    assert main(["run", "-c", "one.yaml", f"--output={tmp_path}", *FAILURES[expected]]) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("coin: error: ")
    assert expected in last
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("coded/*.safetensors"))
