"""The study of promises over random splits of stored answers."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from coin.reporting.extras import RISK_NPZ
from coin.reporting.results import write_archive


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    from notebooks import promises

    return promises


def test_true_promises_are_kept_and_coverage_is_as_large_as_it_may_be(study: ModuleType, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    risk = draw.random(1000)
    answers = np.stack([risk, draw.random(1000) < (risk > 0.7)], 1).astype(np.float32)
    keys = ["coin|auto|linear|a|a", "coin|auto|linear|a+b|a", "oracle||linear|a|a"]
    write_archive(tmp_path / "x/seed-3" / RISK_NPZ, dict.fromkeys(keys, answers))
    frame = pd.DataFrame(study.measure(tmp_path / "x/seed-3", 600, [0.05, 0.001], 0.95, 50))
    assert list(frame["alpha"]) == [0.05, 0.001]  # of the one that is lost alone
    assert set(frame["seed"]) == {3}
    usual, never = frame.to_dict("records")
    assert usual["given"] == 1
    assert usual["untrue"] <= 0.05
    assert 0.68 < usual["coverage"] < 0.75
    assert 0 < usual["found"] < 0.05
    assert (never["given"], never["broken"], never["untrue"], never["coverage"]) == (0, 0, 0, 0)
