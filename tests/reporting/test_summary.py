"""Means and spreads over seeds and tasks by hand, and which seeds count."""

import json
import math
import statistics

import pytest

from coin.errors import FileError
from coin.reporting import experts, standins, summarise
from coin.reporting.results import write_results
from coin.reporting.summary import seed_folders, write_summary
from tests.reporting.conftest import frame, row


def rows_of(ndas, **changes):
    """Return a row for every task's NDA in each seed."""
    found = []
    for task, values in ndas.items():
        for seed, nda in enumerate(values):
            found.append(row(nda, task, seed=seed, residual=1 - nda, **changes))
    return found


def pick(summary, task, erased):
    """Return the one row of a summary of a task and an erasure."""
    (found,) = summary[(summary.task == task) & (summary.erased == erased)].itertuples()
    return found


UNEVEN = {"a": [0.8, 0.9, 0.97], "b": [0.7, 0.95, 0.6]}
MEANS = [0.75, 0.925, 0.785]  # of the tasks, by seed


@pytest.mark.parametrize(
    ("task", "erased", "ndas"),
    [("a", "a", UNEVEN["a"]), ("b", "b", UNEVEN["b"]), ("mean", "1 of 2", MEANS)],
)
def test_mean_and_spread_are_over_seeds_after_the_tasks(task, erased, ndas):
    found = pick(summarise(frame(rows_of(UNEVEN))), task, erased)
    assert found.seeds == 3
    assert found.nda_mean == pytest.approx(statistics.fmean(ndas), rel=1e-14)
    assert found.nda_std == pytest.approx(statistics.stdev(ndas), rel=1e-14)
    assert found.residual_mean == pytest.approx(1 - statistics.fmean(ndas), rel=1e-14)


def test_a_stand_ins_mean_and_spread_are_the_summarys_and_its_worst_task_is_over_seeds_too():
    (kept,) = standins(frame(rows_of(UNEVEN, resident_mib=5.0))).itertuples()
    assert kept.nda_mean == pytest.approx(statistics.fmean(MEANS), rel=1e-14)
    assert kept.nda_std == pytest.approx(statistics.stdev(MEANS), rel=1e-14)
    assert kept.worst_task == "b"
    assert kept.nda_worst == pytest.approx(statistics.fmean(UNEVEN["b"]), rel=1e-14)
    assert kept.memory_mib == 1.0
    assert kept.resident_mib == 5.0


def test_a_stand_in_counts_as_no_more_accurate_than_the_expert():
    (kept,) = standins(frame(rows_of({"a": [1.2], "b": [1.1]}))).itertuples()
    assert kept.nda_worst == 1.0
    assert kept.nda_mean == pytest.approx(1.15)


def test_the_oracle_has_no_memory_and_is_there_where_it_is_asked_for():
    rows = [*rows_of(UNEVEN), *rows_of(UNEVEN, method="oracle", memory_mib=math.nan)]
    assert standins(frame(rows)).method.tolist() == ["coin"]
    assert standins(frame(rows), oracle=True).method.tolist() == ["coin", "oracle"]


def test_the_experts_own_accuracies_are_over_seeds():
    own = experts(frame(rows_of(UNEVEN)))
    assert own.loc["a"].tolist() == [3, pytest.approx(0.9), pytest.approx(0)]


def test_one_seed_has_no_spread_and_an_empty_field(written):
    folder = written(rows_of({"a": [0.9], "b": [0.8]}))
    assert write_summary(folder).nda_std.isna().all()
    text = (folder / "summary.csv").read_text(encoding="utf-8")
    assert "nan" not in text.lower()
    header = text.partition("\n")[0].split(",")
    assert {"seeds", "nda_mean", "nda_std", "memory_mib_mean"} < set(header)


def test_nan_is_never_left_out_of_a_mean():
    rows = rows_of({"a": [math.nan, 0.9], "b": [0.8, 0.7]})
    summary = summarise(frame(rows))
    for found in (pick(summary, "a", "a"), pick(summary, "mean", "1 of 2")):
        assert math.isnan(found.nda_mean)
        assert math.isnan(found.nda_std)
    assert pick(summary, "b", "b").nda_mean == pytest.approx(0.75)
    assert standins(frame(rows)).empty


def test_larger_erasures_are_grouped_by_their_size():
    rows = rows_of({"a": [0.9], "b": [0.9], "c": [0.9]})
    for task, other, nda in (
        ("a", "b", 0.8),
        ("b", "a", 0.6),
        ("a", "c", 0.5),
        ("c", "a", 0.7),
        ("b", "c", 0.2),
        ("c", "b", 0.3),
    ):
        erased = "+".join(sorted([task, other]))
        rows.append(row(nda, task, erased=erased, code_row="0+1"))
    mean = (0.8 + 0.6 + 0.5 + 0.7 + 0.2 + 0.3) / 6
    summary = summarise(frame(rows))
    assert pick(summary, "mean", "1 of 3").nda_mean == pytest.approx(0.9)
    assert pick(summary, "mean", "2 of 3").nda_mean == pytest.approx(mean)
    assert pick(summary, "a", "a+c").nda_mean == 0.5
    (kept,) = standins(frame(rows)).itertuples()
    assert kept.nda_mean == pytest.approx(0.9)
    assert kept.nda_2_lost == pytest.approx(mean)


def test_seeds_that_chose_differently_are_one_variant():
    rows = [row(0.8, seed=0, batchnorm="auto:average"), row(0.9, seed=1, batchnorm="auto:same")]
    found = pick(summarise(frame(rows)), "mean", "1 of 1")
    assert found.batchnorm == "auto"
    assert found.seeds == 2
    assert found.nda_mean == pytest.approx(0.85)
    assert standins(frame(rows)).nda_mean.tolist() == [pytest.approx(0.85)]


@pytest.fixture
def seeds(tmp_path):
    """An experiment's folder with three seeds, of which the last one has other options."""
    for seed, rate in ((10, 0.1), (2, 0.1), (0, 0.3)):
        configuration = {"expert": {"lr": rate}, "seeds": [seed]}
        write_results(tmp_path / f"seed-{seed}", [row(0.9, seed=seed)], configuration)
    return tmp_path


def test_seeds_of_different_options_are_not_averaged(seeds):
    with pytest.raises(FileError, match="measured with different options"):
        seed_folders(seeds)
    assert seed_folders(seeds / "seed-0") == [seeds / "seed-0"]


def test_the_seeds_of_the_last_run_are_read_in_their_order(seeds):
    (seeds / "seeds.json").write_text(json.dumps({"seeds": [10, 2]}))
    assert [folder.name for folder in seed_folders(seeds)] == ["seed-2", "seed-10"]


def test_all_rows_that_somebody_has_kept_are_read(seeds):
    for file in seeds.glob("*/results.json"):
        file.unlink()
    assert [folder.name for folder in seed_folders(seeds)] == ["seed-0", "seed-2", "seed-10"]
