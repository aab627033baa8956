"""The GPU's benchmark runs to its end on a CPU, on a tiny network."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "gpu.py"


@pytest.mark.slow
def test_smallest_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gpu.json"
    sizes = ["--networks", "small_resnet", "--device", "cpu", "--side", "16", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *sizes, "--output", str(output)])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)  # the script changes it
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    found = json.loads(output.read_text())
    assert json.loads(shown.out) == found
    rows = {(row["step"], row["precision"]): row for row in found["rows"]}
    decoders = ("linear", "ridge", "feature_ridge", "expert_head")
    full = {"refit", *(f"{kind} {verb}" for kind in decoders for verb in ("fit", "decode"))}
    assert {step for step, _ in rows} == {"forward", "fisher", "training step", "answers", *full}
    assert {step for step, precision in rows if precision == "bfloat16"} == {step for step, _ in rows} - full
    for (step, precision), row in rows.items():
        assert f"{step:22}{precision}" in shown.err
        assert all(0 < row[key] < math.inf for key in ("seconds", "ratio_to_forward", "peak_mib"))
    assert found["sizes"]["side"] == 16
    assert found["torch"] == torch.__version__
