"""Means and spreads over seeds and tasks by hand, and which seeds count."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from coin.errors import FileError
from coin.reporting import experts, standins, summarise
from coin.reporting.results import Row, write_results
from coin.reporting.summary import seed_folders, write_summary
from tests.reporting.conftest import BASE, frame


def row(seed: int, task: str, nda: float, erased: str = "", **changes: object) -> Row:
    own = {"decoded_accuracy": 0.9 * nda, "agreement": nda / 2, "residual": 1 - nda, "memory_mib": 2.0}
    return replace(BASE, seed=seed, task=task, nda=nda, erased=erased or task, **{**own, **changes})  # type: ignore


def pick(summary: pd.DataFrame, **where: object) -> pd.Series:
    for name, value in where.items():
        summary = summary[summary[name] == value]
    assert len(summary) == 1
    return summary.iloc[0]


def test_mean_and_spread_over_seeds_and_tasks():
    ndas = {"a": [0.8, 0.9, 0.97], "b": [0.7, 0.95, 0.6]}
    rows = frame(*(row(seed, task, ndas[task][seed]) for seed in range(3) for task in "ab"))
    summary = summarise(rows)
    assert len(summary) == 3
    for task, values in ndas.items():
        found = pick(summary, task=task, erased=task)
        assert found["seeds"] == 3
        assert found["nda_mean"] == pytest.approx(statistics.fmean(values), rel=1e-14)
        assert found["nda_std"] == pytest.approx(statistics.stdev(values), rel=1e-14)
        assert found["residual_mean"] == pytest.approx(1 - statistics.fmean(values), rel=1e-14)
    per_seed = [statistics.fmean(pair) for pair in zip(*ndas.values(), strict=True)]
    mean = pick(summary, task="mean", erased="1 of 2")
    for found in (mean, standins(rows).iloc[0]):
        assert found["nda_mean"] == pytest.approx(statistics.fmean(per_seed), rel=1e-14)
        assert found["nda_std"] == pytest.approx(statistics.stdev(per_seed), rel=1e-14)  # no mean of the tasks' spreads
    assert experts(rows).loc["a", ["seeds", "mean", "spread"]].tolist() == [3, pytest.approx(0.9), pytest.approx(0)]


def test_one_seed_has_no_spread_and_an_empty_field(tmp_path: Path):
    write_results(tmp_path / "seed-0", [row(0, "a", 0.9), row(0, "b", 0.8)], {})
    summary = write_summary(tmp_path)
    assert summary["nda_std"].isna().all()
    assert "nan" not in (tmp_path / "summary.csv").read_text(encoding="utf-8").lower()


def test_nan_is_never_left_out_of_a_mean():
    ndas = {("a", 0): math.nan, ("a", 1): 0.9, ("b", 0): 0.8, ("b", 1): 0.7}
    rows = frame(*(row(seed, task, nda) for (task, seed), nda in ndas.items()))
    summary = summarise(rows)
    for task in ("a", "mean"):
        assert math.isnan(pick(summary, task=task)["nda_mean"])
        assert math.isnan(pick(summary, task=task)["nda_std"])
    assert pick(summary, task="b")["nda_mean"] == pytest.approx(0.75)
    assert standins(rows).empty


def test_larger_erasures_are_grouped_by_their_size():
    single = [row(0, task, 0.9) for task in "abc"]
    lost = {"a+b": (0.8, 0.6), "a+c": (0.5, 0.7), "b+c": (0.2, 0.3)}
    pairs = [row(0, e[2 * i], ndas[i], erased=e, code_row="0+1") for e, ndas in lost.items() for i in (0, 1)]
    summary = summarise(frame(*single, *pairs))
    mean = statistics.fmean([0.8, 0.6, 0.5, 0.7, 0.2, 0.3])
    for erased, nda in (("1 of 3", 0.9), ("2 of 3", mean)):
        assert pick(summary, task="mean", erased=erased)["nda_mean"] == pytest.approx(nda)
    assert pick(summary, task="a", erased="a+c")["nda_mean"] == 0.5
    (kept,) = standins(frame(*single, *pairs)).to_dict("records")
    assert (kept["nda_mean"], kept["nda_2_lost"]) == (pytest.approx(0.9), pytest.approx(mean))


def test_seeds_that_chose_differently_are_one_variant():
    rows = [row(seed, "a", 0.8 + seed / 10, batchnorm=f"auto:{took}") for seed, took in enumerate(("average", "same"))]
    found = pick(summarise(frame(*rows)), task="mean", batchnorm="auto")
    assert (found["seeds"], found["nda_mean"]) == (2, pytest.approx(0.85))
    assert standins(frame(*rows))["nda_mean"].tolist() == [pytest.approx(0.85)]


def test_the_seeds_of_the_last_run_are_read_or_all_where_none_has_ended(tmp_path: Path):
    for seed in (10, 2, 0):
        write_results(tmp_path / f"seed-{seed}", [row(seed, "a", 0.9)], {})
    assert [folder.name for folder in seed_folders(tmp_path)] == ["seed-0", "seed-2", "seed-10"]
    (tmp_path / "seeds.json").write_text(json.dumps({"seeds": [10, 2]}))
    assert [folder.name for folder in seed_folders(tmp_path)] == ["seed-2", "seed-10"]
    assert seed_folders(tmp_path / "seed-0") == [tmp_path / "seed-0"]


def test_seeds_of_different_options_are_not_averaged(tmp_path: Path):
    for seed, rate in ((0, 0.1), (1, 0.1), (2, 0.3)):
        options = {"expert": {"lr": rate}, "seeds": [seed]}
        write_results(tmp_path / f"seed-{seed}", [row(seed, "a", 0.9)], options)
    with pytest.raises(FileError, match="measured with different options"):
        seed_folders(tmp_path)
    (tmp_path / "seeds.json").write_text(json.dumps({"seeds": [0, 1]}))
    assert len(seed_folders(tmp_path)) == 2


def test_what_may_be_kept_has_the_worst_task_over_seeds_too():
    ndas = {("a", 0): 0.9, ("a", 1): 0.7, ("b", 0): 0.85, ("b", 1): 0.95}
    rows = [row(seed, task, nda, resident_mib=5.0) for (task, seed), nda in ndas.items()]
    oracle = [replace(each, method="oracle", memory_mib=math.nan) for each in rows]
    (kept,) = standins(frame(*rows, *oracle)).to_dict("records")
    assert (kept["worst_task"], kept["memory_mib"], kept["resident_mib"]) == ("a", 2.0, 5.0)
    assert (kept["nda_worst"], kept["nda_mean"]) == (pytest.approx(0.8), pytest.approx(0.85))
    every = standins(frame(*rows, *oracle), oracle=True)
    assert every["method"].tolist() == ["coin", "oracle"]
