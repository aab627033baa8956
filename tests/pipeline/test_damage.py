"""``coin run`` at its limits: two calibration samples a task, experts that are no numbers."""

from pathlib import Path

import pytest
import torch

from coin.files.safetensors import load_state
from coin.reporting import read_results

METHODS = """
calibration: {samples_per_task: 2}
methods:
  - {class_path: Average}
  - {class_path: Coin}
  - {class_path: RegMean}
  - {class_path: HeadFit}
  - {class_path: Distillation, init_args: {steps: 3, lr: 1.0e-3}}
"""


@pytest.mark.slow
@pytest.mark.usefixtures("no_reports")
def test_two_samples_a_task_serve_every_method_and_decoder(run_small, trained):
    seed = run_small(trained + METHODS)
    coded = list((seed / "coded").glob("*.safetensors"))
    assert len(coded) == 5
    for path in coded:
        state, _ = load_state(path)
        assert all(bool(tensor.isfinite().all()) for tensor in state.values()), path.name
    frame = read_results(seed)
    assert frame["decoded_accuracy"].notna().all()
    assert len(frame) == 5 * 3 * 2 + 2 * 2 + 2


FAILURES = {
    "training diverged": "--expert.lr=1.0e+30",
    "nan.pt' is not finite: tensor 'fc.bias' holds a NaN": "--expert.checkpoints.digits=nan.pt",
    "tensor 'fc.bias' holds a NaN": "--base={checkpoint: nan.pt, task: null}",
}


@pytest.mark.parametrize("expected", FAILURES)
def test_an_expert_that_is_no_number_is_one_line(expected, run, write_experts, tmp_path, capsys):
    (path,) = write_experts([10]).values()
    state, _ = load_state(Path(path))
    state["fc.bias"][0] = torch.nan
    torch.save(state, "nan.pt")
    assert run("--base=null", "--only=digits", FAILURES[expected]) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("coin: error: ")
    assert expected in last
    assert "Traceback" not in error
    assert not list(tmp_path.glob("tiny/seed-0/experts/*"))
