"""Results that look like a real experiment's, made through the public API."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from coin.reporting.results import Row, confusion_key, write_results

# method, BatchNorm policy, NDA of linear, ridge and feature_ridge, residual, seconds, forward-equivalents
METHODS = (
    ("none", "", (None, 0.563, 0.910), float("nan"), 0.0, 0.0),
    ("oracle", "", (1.0, 1.0, 1.0), 0.0, 0.0, 0.0),
    ("average", "auto:average", (0.857, 0.966, 0.9835), 0.61, 0.0, 0.0),
    ("coin", "auto:average", (0.867, 0.960, 0.984), 0.58, 4.1, 8400.0),
    ("coin-recalibrate", "recalibrate", (0.862, 0.965, 0.981), 0.55, 4.6, 8800.0),
    ("distillation", "keep", (0.980, 0.979, 0.981), 0.22, 30.4, 57600.0),
)
FEW = (METHODS[0], METHODS[2], ("coin", "auto:recalibrate", (0.867, 0.960, 0.984), 0.58, 4.1, 8400.0))
DECODERS = ("linear", "ridge", "feature_ridge")
EXPERTS = (0.956, 0.987, 0.912)

BASE = Row("x", 0, "coin", "auto:average", "linear", "0", "a", "a", 200, 0.9, 0.8, 8 / 9, 0.85, 0.5, 4.0, 8e3, 0.2, 9.0)
Confusions = dict[str, NDArray[np.int64]]
Make = Callable[..., Path]


def frame(*rows: Row) -> pd.DataFrame:
    """Return rows as they are in ``results.csv``."""
    return pd.DataFrame([vars(row) for row in rows])


def measured(
    seed: int,
    tasks: Sequence[str] = ("mnist", "letters"),
    experiment: str = "quickstart",
    samples: int = 200,
    methods: Sequence[tuple] = METHODS,
    classes: int = 10,
) -> tuple[list[Row], Confusions]:
    """Return rows and confusions of one seed, with every task lost in turn."""
    draw = np.random.default_rng(1000 * seed + samples)
    rows, confusions = [], {}
    for method, batchnorm, ndas, residual, seconds, passes in methods:
        for decoder, nda in zip(DECODERS, ndas, strict=True):
            if nda is None:
                continue
            for i, task in enumerate(tasks):
                expert = EXPERTS[i % len(EXPERTS)]
                noise = 0.0 if method == "oracle" else draw.normal(0.0, 0.006)
                ratio = min(1.0, nda + noise - 0.01 * i * (method != "oracle"))
                left = math.nan if method == "oracle" else 1.0
                row = Row(
                    experiment, seed, method, batchnorm, decoder, "" if method == "none" else "0", task, task, samples,
                    expert, expert * ratio, ratio, agreement=min(1.0, ratio + 0.005), residual=residual,
                    merge_seconds=seconds * samples / 200 * (1 + 0.05 * draw.random()),
                    merge_passes=passes * samples / 200,
                    decoder_seconds=0.5 * (decoder != "linear"),
                    decoder_passes=(decoder != "linear") * 2.0 * samples * (2 + (method != "none")),
                    memory_mib=left * (11.0 * (method != "none") + 0.1 * len(decoder)),
                    resident_mib=left * (12.0 * (method != "none") + 0.1 * len(decoder)),
                    forwards=left * (len(tasks) - 1.0 + (method != "none")),
                    losses=left,
                    chance=1 / classes,
                )  # fmt: skip
                rows.append(row)
                counts = draw.integers(0, 4, (classes, classes)) + np.diag(draw.integers(60, 100, classes))
                confusions[confusion_key(row)] = counts.astype(np.int64)
    return rows, confusions


@pytest.fixture
def measure() -> Callable[..., tuple[list[Row], Confusions]]:
    """Return `measured`."""
    return measured


CONFIGURATION: dict[str, Any] = {"network": {"name": "small_resnet", "image_size": 32, "weights": None}}
CONFIGURATION["tasks"] = {"mnist": {"class_path": "MNIST5k"}, "letters": {"class_path": "Glyphs"}}
CONFIGURATION["code"] = [[0.5, 0.5]]


@pytest.fixture
def make_experiment(tmp_path: Path) -> Make:
    """Return a function that writes an experiment folder and returns it."""

    def make(name: str = "quickstart", seeds: Sequence[int] = (0, 1, 2), **options: Any) -> Path:
        for seed in seeds:
            rows = measured(seed, experiment=name, **options)[0]
            write_results(tmp_path / "runs" / name / f"seed-{seed}", rows, CONFIGURATION)
        return tmp_path / "runs" / name

    return make
