"""Results that look like a real experiment's, made through the public API."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from coin.reporting.results import Row, write_results

# fmt: off
BASE = Row(
    "x", 0, "coin", "auto:average", "linear", "0", "a", "a", 200,
    0.9, 0.8, 8 / 9, 0.85, 0.5, 4.0, 8e3, 0.2, 9.0,
)
# fmt: on
COSTS = {"memory_mib": 1.0, "resident_mib": 1.0, "forwards": 1.0, "losses": 1.0}
CONFIGURATION = {"network": {"name": "small_resnet"}, "tasks": {"a": {"class_path": "MNIST5k"}}}
KEPT = {
    ("none", "ridge"): (0.563, 0.2),
    ("average", "linear"): (0.857, 11.0),
    ("average", "ridge"): (0.966, 11.1),
    ("coin", "linear"): (0.867, 11.0),
    ("coin", "ridge"): (0.960, 11.1),
    ("refit", "expert_head"): (0.999, 11.2),
    ("oracle", "linear"): (1.0, math.nan),
}
"""NDA and memory of stand-ins."""


def row(nda, task="a", **changes):
    """Return a row of a task that is lost alone."""
    own = {"nda": nda, "decoded_accuracy": 0.9 * nda, "task": task, "erased": task}
    return replace(BASE, **own | COSTS | changes)


def frame(rows):
    """Return rows as they are in ``results.csv``."""
    return pd.DataFrame([vars(each) for each in rows])


def measured(seed):
    """Return the rows of a seed, with two tasks lost in turn."""
    rows = []
    for (method, decoder), (nda, memory) in KEPT.items():
        names = {"seed": seed, "method": method, "decoder": decoder, "memory_mib": memory}
        on_a = min(1.0, nda + 0.001 * seed)
        on_b = on_a if method == "oracle" else on_a - 0.01
        rows += [row(on_a, "a", **names), row(on_b, "b", **names)]
    return rows


@pytest.fixture
def experiment(tmp_path):
    """The folder of an experiment of three seeds."""
    folder = tmp_path / "runs/quickstart"
    for seed in range(3):
        write_results(folder / f"seed-{seed}", measured(seed), CONFIGURATION)
    return folder


@pytest.fixture
def written(tmp_path):
    """Return a function that writes the rows of one seed, and returns the experiment's folder."""

    def write(rows):
        write_results(tmp_path / "seed-0", rows, {})
        return tmp_path

    return write
