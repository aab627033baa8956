"""The study of experts that answer wrongly, on a finished experiment."""

import pandas as pd
import pytest

from notebooks import silent_faults


def faults(expert, start):
    """Return the untouched expert, and one whose last layer's answers are turned around."""
    same, turned = (silent_faults.between(start, expert, 1.0) for _ in range(2))
    turned.fc.weight.neg_()
    return {"none": expert, "all the way": same, "turned": turned}


@pytest.mark.slow
def test_an_expert_of_the_opposite_opinion_is_exposed_and_named(finished, monkeypatch):
    monkeypatch.setattr(silent_faults, "faults", faults)
    rows = pd.DataFrame(silent_faults.measure(finished / "seed-0", "average", [4], 40))
    assert set(rows["method"]) == {"average", "none"}
    turned = rows[(rows["method"] == "average") & (rows["fault"] == "turned")]
    assert set(turned["task"]) == {"digits", "letters"}
    assert (turned["faulty_accuracy"] < turned["expert_accuracy"]).all()
    assert (turned["oddness"] > 1.2 * turned["usual"]).all()
    assert (turned["alarm"] > 0.5).all()
    assert (turned["named"] > 0.5).all()
