"""The study of experts that answer wrongly, on a finished experiment."""

import sys
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(monkeypatch):
    """The study, of the untouched expert, and of one whose last layer's answers are turned around."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    from notebooks import silent_faults

    def faults(expert, start):
        same, turned = (silent_faults.between(start, expert, 1.0) for _ in range(2))
        turned.fc.weight.neg_()
        return {"none": expert, "all the way": same, "turned": turned}

    monkeypatch.setattr(silent_faults, "faults", faults)
    return silent_faults


@pytest.fixture
def rows(finished, study):
    (seed,) = finished.glob("seed-*")
    rows = pd.DataFrame(study.measure(seed, "average", [4], 40))
    assert set(rows.method) == {"average", "none"}
    return rows[rows.method == "average"]


def test_an_expert_of_the_opposite_opinion_is_exposed_and_named(rows):
    turned = rows[rows.fault == "turned"]
    assert set(turned.task) == set(rows.task)
    assert (turned.faulty_accuracy < turned.expert_accuracy).all()
    assert (turned.oddness > 1.2 * turned.usual).all()
    assert (turned.alarm > 0.5).all()
    assert (turned.named > 0.5).all()
