"""Each benchmark in its smallest form: what it measures is what it says. Times are not held to anything here."""

import gc
import json
import math
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "notebooks/benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Return a function that returns the names that a benchmark's file defines."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return lambda name: runpy.run_path(str(BENCHMARKS / f"{name}.py"))


def test_the_ways_to_the_fisher_agree(benchmark):
    fisher = benchmark("fisher")
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 10))
    network.double()
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = fisher["naive"](network, images)
    for way in ("coin", "vmap_of_vjp"):
        assert fisher["tensor_error"](fisher[way](network, images), expected) < 1e-9
    ways = {way: (fisher[way], network) for way in ("limit", "coin")}
    assert fisher["seconds_of"](ways, images, 1).keys() == {"limit", "coin"}


def test_the_timed_body_answers_as_its_network(benchmark):
    bodies = benchmark("bodies")
    network = bodies["network_of"]("small_resnet", 16)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(bodies["body_of"](network)(images), network(images))
    rows = pd.DataFrame(bodies["timed"]("small_resnet", 16, 0.0))
    assert rows["batch"].tolist() == [1, 8]
    assert (rows[["plain ms", "packed"]] > 0).all(axis=None)
    assert rows["mixed"].iloc[-1] > 0


def test_an_event_is_measured_from_its_answers(benchmark):
    failover = benchmark("failover")

    def answered(sent, seconds, place=0, status=200):
        is_exact = status == 200
        ended = sent + seconds
        return failover["Answered"](place, [0], sent, ended, status, is_exact=is_exact)

    before = [answered(sent, 0.1) for sent in (0.0, 1.0, 2.0)]
    lost = answered(10.0, 0.2, status=503)
    late = answered(10.5, 0.5)
    in_time = [answered(11.0 + sent, 0.1) for sent in range(failover["IN_TIME"])]
    other = answered(10.1, 0.1, place=1)
    row = failover["event_row"]([*before, lost, late, *in_time, other], 10.0, [0], 12.0)
    expected = {
        "objective_ms": 200.0,
        "late_before": 0.0,
        "first_right_ms": 1000.0,  # the late one is right too
        "last_late_ms": 1000.0,
        "recovered_ms": 1000.0,
        "failed": 1.0,
        "asked": 13.0,
        "goodput": 11 / 12,
        "beyond": 2 / 13,
        "p50_ms": 100.0,
        "p99_ms": math.inf,
    }
    assert row == pytest.approx(expected)


@pytest.fixture
def frozen_heap():
    """Garbage collections, one before each step of a benchmark, pass over what all imports have made."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen_heap")
def test_the_gpus_steps_run_on_a_cpu(monkeypatch, capsys):
    sizes = ["--networks", "small_resnet", "--device", "cpu", "--side", "16", "--repeats", "1"]
    script = str(BENCHMARKS / "gpu.py")
    monkeypatch.setattr(sys, "argv", [script, *sizes])
    allows_tf32 = torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allows_tf32)  # the script changes it
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    first, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert ended.value.code == 0, rows
    assert first["side"] == 16
    steps = {row["step"] for row in rows}
    assert {"forward", "fisher", "refit", "training step", "linear fit", "ridge decode"} <= steps
    for row in rows:
        assert all(0 < row[key] < math.inf for key in ("seconds", "ratio_to_forward", "peak_mib"))
