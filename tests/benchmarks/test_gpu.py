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
def test_smallest_form(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--networks", "small_resnet", "--device", "cpu", "--side", "16", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *sizes])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)  # the script changes it
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    first, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert ended.value.code == 0, rows
    assert (first["side"], first["torch"]) == (16, torch.__version__)
    decoders = ("linear", "ridge", "feature_ridge", "expert_head")
    full = {"refit", *(f"{kind} {verb}" for kind in decoders for verb in ("fit", "decode"))}
    mixed = {"forward", "fisher", "training step", "answers"}
    assert {row["step"] for row in rows if row["precision"] == "float32"} == full | mixed
    assert {row["step"] for row in rows if row["precision"] == "bfloat16"} == mixed
    assert all(0 < row[key] < math.inf for row in rows for key in ("seconds", "ratio_to_forward", "peak_mib"))
