"""Which stand-in is chosen: the cheapest that meets all limits on the worst task, or what comes nearest."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import coin
from coin.cli import main
from coin.commands.serve import recommended_copies
from coin.errors import ConfigurationError, FileError
from coin.reporting import write_report
from coin.reporting.choice import choose, recommended, shortlist
from coin.reporting.results import write_results
from coin.reporting.standins import standins
from coin.reporting.summary import read_run
from coin.reporting.tables import print_standins
from tests.reporting.conftest import BASE

# method, decoder, NDA on a and on b, memory, resident memory, forwards, losses
KEPT = (
    ("none", "ridge", 0.80, 0.60, 0.1, 0.1, 1, 1),
    ("small", "expert_head", 1.10, 0.985, 5.0, 6.0, 1, 2),
    ("small", "ridge", 0.99, 0.99, 5.0, 7.0, 2, 1),
    ("uneven", "expert_head", 1.00, 0.97, 2.0, 12.0, 1, 2),
    ("large", "expert_head", 0.999, 0.999, 30.0, 30.0, 1, 2),
    ("replica", "replica", 1.05, 1.02, 20.0, 24.0, 1, 2),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, costs = tmp_path_factory.mktemp("run"), ("memory_mib", "resident_mib", "forwards", "losses")
    for seed in (0, 1):
        rows = [
            replace(BASE, seed=seed, method=name, decoder=decoder, erased=task, task=task, nda=nda, **kept)
            for name, decoder, *ndas, memory, resident, forwards, losses in KEPT
            for kept in [dict(zip(costs, (memory, resident, forwards, losses), strict=True))]
            for task, nda in zip("ab", ndas, strict=True)
        ]
        write_results(folder / f"seed-{seed}", rows, {})
    return folder


def chosen(folder: Path, **wishes: object) -> tuple[list[tuple[str, str]], str]:
    rows, sentence = choose(folder, **wishes)  # type: ignore[arg-type]
    return list(zip(rows["method"], rows["decoder"], strict=True)), sentence


def test_the_cheapest_that_meets_all_limits_is_first(folder: Path):
    # The mean of `uneven` is 98.5 %, its worst task 97; of equal memory the fewer networks win; NDA counts to 100 %.
    for wishes, first, count in (
        ({"accuracy": 0.98}, ("small", "expert_head"), 4), ({"accuracy": 0.97}, ("uneven", "expert_head"), 5),
        ({"accuracy": 0.99}, ("small", "ridge"), 3), ({"accuracy": 0.99, "forwards": 1}, ("replica", "replica"), 2),
        ({"accuracy": 0.99, "losses": "all"}, ("replica", "replica"), 2), ({"accuracy": 0.5}, ("none", "ridge"), 6),
        ({"accuracy": 0.99, "losses": 2, "memory_mib": 20}, ("replica", "replica"), 1),
        ({"accuracy": 1}, ("replica", "replica"), 1),
        ({"accuracy": 0.97, "resident_mib": 10}, ("small", "expert_head"), 2),
        ({"accuracy": 0.99, "losses": 2, "resident_mib": 24}, ("replica", "replica"), 1),
    ):  # fmt: skip
        rows, sentence = chosen(folder, **wishes)
        assert (rows[0], len(rows)) == (first, count)
        assert sentence.startswith(f"Keep {first[0].replace('none', 'the survivors alone')}")
        assert sentence.count(". ") == 1


def test_where_nothing_meets_the_limits_the_nearest_are_told(folder: Path):
    sentence = chosen(folder, accuracy=1)[1]
    assert "replica (100.00 % of the lost expert's accuracy on the worst task, b; 20 MiB, 24 MiB resident;" in sentence
    assert "and resident_mib <= 23" in chosen(folder, accuracy=1, resident_mib=23)[1]
    rows, sentence = chosen(folder, accuracy=0.99, memory_mib=10, forwards=1)
    assert rows == []
    assert "the smallest that is accurate enough is small with ridge" in sentence
    assert "the most accurate within the limits is small with expert_head (98.50 %" in sentence
    sentence = chosen(folder, accuracy=1, losses=3)[1]
    assert "accurate enough is replica" in sentence
    assert "within the limits" not in sentence


def test_all_that_names_a_stand_in_names_the_recommended_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _, frame = read_run(folder)
    kept = standins(frame)
    row = recommended(kept)
    assert (row["method"], row["decoder"]) == ("small", "expert_head")
    assert choose(folder)[1].startswith("Keep small with expert_head (98.50 %")
    assert recommended_copies(folder) is None
    print_standins(frame)
    assert choose(folder)[1] in capsys.readouterr().out
    page = " ".join(write_report(folder, tmp_path / "page.html").read_text(encoding="utf-8").split())
    assert "Keep small with expert_head (98.50 %" in page
    # Where none is accurate enough, the most accurate on the worst task.
    weak = kept[kept["nda_worst"] < 0.98]
    assert recommended(weak)["method"] == "uneven"


@pytest.mark.parametrize("fewer_mib", [20 / 2**20, 1e-3])
def test_of_what_is_printed_alike_the_more_accurate_is_recommended_and_starred(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fewer_mib: float
):
    costs = {"forwards": 1.0, "losses": 2.0, "resident_mib": 4.0, "decoder": "expert_head"}
    rows = []
    for name, memory, ndas in (("base", 2.55 - fewer_mib, (0.991, 0.990)), ("refit", 2.55, (0.993, 0.992))):
        for task, nda in zip("ab", ndas, strict=True):
            own = {"method": name, "task": task, "erased": task, "nda": nda, "memory_mib": memory}
            rows.append(replace(BASE, **own, **costs))
    write_results(tmp_path / "seed-0", rows, {})
    _, frame = read_run(tmp_path)
    sentence = choose(tmp_path)[1]
    assert sentence.startswith("Keep refit with expert_head (99.20 %")
    page = " ".join(write_report(tmp_path).read_text(encoding="utf-8").split())
    assert "Keep refit with expert_head (99.20 %" in page
    print_standins(frame)
    printed = capsys.readouterr().out
    assert "99.25*" in printed
    assert "99.05*" not in printed
    assert sentence in printed


def test_what_is_recommended_stands_in_the_table_though_others_are_better_on_average():
    rows = [("none", "ridge", 0.85, 0.5), ("none", "linear", 0.80, 0.5), ("coin", "linear", 0.84, 0.68)]
    rows += [("coin", "ridge", 0.86, 0.6)]
    kept = pd.DataFrame(rows, columns=["method", "decoder", "nda_mean", "nda_worst"])
    assert recommended(kept)["decoder"] == "linear"
    assert list(shortlist(kept)) == [True, False, True, True]


def test_nothing_is_recommended_where_the_experts_are_too_weak(tmp_path: Path):
    costs = {"memory_mib": 1.0, "resident_mib": 1.0, "forwards": 1.0, "losses": 1.0}
    rows = [replace(BASE, erased=task, task=task, nda=3.0, **costs) for task in "ab"]
    write_results(tmp_path / "seed-0", rows, {})
    found, sentence = choose(tmp_path)
    assert found.empty
    assert sentence.startswith("Nothing can be recommended: what stands in is right more often than the lost experts")
    assert sentence in write_report(tmp_path).read_text(encoding="utf-8")


def test_nothing_is_recommended_where_an_expert_is_at_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # Answers that are as often right as those of an expert that guesses among ten classes: NDA is 1.
    own = {"memory_mib": 1.0, "resident_mib": 1.0, "forwards": 1.0, "losses": 1.0, "nda": 1.0}
    good = replace(BASE, erased="a", task="a", expert_accuracy=0.95, chance=0.5, **own)
    weak = replace(BASE, erased="b", task="b", expert_accuracy=0.12, chance=0.1, **own)
    write_results(tmp_path / "seed-0", [good, weak], {})
    found, sentence = choose(tmp_path)
    assert found.empty
    assert sentence.startswith("Nothing can be recommended: the expert of 'b' is hardly more often right than chance")
    page = " ".join(write_report(tmp_path).read_text(encoding="utf-8").replace("&#39;", "'").split())
    assert page.count(sentence) == 1
    _, frame = read_run(tmp_path)
    print_standins(frame)
    assert "recommended: the expert of 'b' is hardly" in capsys.readouterr().out
    write_results(tmp_path / "seed-0", [good, replace(weak, expert_accuracy=0.9)], {})
    assert choose(tmp_path)[1].startswith("Keep coin with linear")


def test_limits_that_cannot_be_are_refused(folder: Path):
    for accuracy in (0, 98):
        with pytest.raises(ConfigurationError, match=rf"found accuracy={accuracy}, expected"):
            chosen(folder, accuracy=accuracy)


def test_the_command_prints_table_and_reason(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["choose", str(folder), "--accuracy=0.99", "--losses=all", "--memory_mib=25", "--resident_mib=25"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if "replica" in line)
    assert row == ["replica", "replica", "103.50", "±", "0.00*", "100.00", "20", "24", "1", "2"]
    assert lines[-1].startswith("Keep replica (100.00 %")
    assert main(["choose", str(folder), "--accuracy=1", "--memory_mib=1"]) == 0
    assert (
        capsys.readouterr().out.strip() == choose(folder, accuracy=1, memory_mib=1)[1] == coin.choose(folder, 1, 1)[1]
    )
    to_no_reader = f"{sys.executable} -m coin choose {folder} | true"
    assert subprocess.run(to_no_reader, shell=True, capture_output=True, check=True).stderr == b""


def test_folders_without_results_are_one_line_and_without_known_memory_recommend_nothing(
    tmp_path: Path, make_experiment: Callable[..., Path]
):
    with pytest.raises(FileError, match=r"found neither .* make it with `coin run`"):
        choose(tmp_path)
    oracle = (("oracle", "", (1.0, 1.0, 1.0), 0.0, 0.0, 0.0),)
    rows, sentence = choose(make_experiment(seeds=(0,), methods=oracle))
    assert rows.empty
    assert sentence.startswith("Nothing can be recommended")
