"""The table of stand-ins, in text and in a terminal of 80 columns."""

import math
from dataclasses import replace

import pytest

from coin.reporting import standin_table, standins
from coin.reporting.choice import shortlist, undominated
from coin.reporting.results import Row
from coin.reporting.tables import percent, print_standins
from tests.reporting.conftest import BASE, frame


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def stand_in_rows() -> list[Row]:
    """Four systems: two that others beat, in one quantity or in all; and the oracle."""
    kept = {"memory_mib": 10.0, "resident_mib": 11.0, "forwards": 2.0, "losses": 1.0}
    large = {"memory_mib": 1234.0, "resident_mib": 1234.0, "forwards": 3.0, "losses": 1.0}
    rows = [
        replace(BASE, nda=0.99, method="a", **kept),
        replace(BASE, nda=0.99, method="b", **{**kept, "memory_mib": 12.0}),
        replace(BASE, nda=0.97, method="b", decoder="expert_head", **{**kept, "forwards": 1.0, "losses": 2.0}),
        replace(BASE, nda=0.95, method="c", decoder="expert_head", **large),
        replace(BASE, nda=1.0, method="oracle"),
    ]
    return [replace(row, task=task, erased=task) for row in rows for task in "pq"]


def test_what_to_keep_is_told_by_cost_and_the_undominated_ones_are_marked():
    kept = standins(frame(*stand_in_rows()))
    assert list(zip(kept["method"], kept["memory_mib"], strict=True)) == [("b", 10), ("a", 10), ("b", 12), ("c", 1234)]
    assert list(undominated(kept)) == [True, True, False, False]
    assert list(shortlist(kept)) == [False, True, True, True]  # b's best decoder is beaten, and shown
    table = standin_table(kept)
    assert table.loc[1].tolist()[:8] == ["a", "linear", "99.00*", "99.00", "10", "11", "2", "1"]
    assert table.loc[3].tolist()[:8] == ["c", "expert_head", "95.00", "95.00", "1,230", "1,230", "3", "1"]
    assert table.loc[3].tolist()[8:] == ["85.00", "4.0", "8,000"]
    assert standin_table(kept[:0]).empty


def test_resident_memory_counts():
    rows = stand_in_rows()
    heavy = [replace(row, resident_mib=50.0) if row.method == "b" else row for row in rows]
    kept = standins(frame(*heavy, *(replace(row, method="d", resident_mib=60.0) for row in heavy[:2])))
    assert not dict(zip(kept["method"], undominated(kept), strict=True))["d"]  # a is equal but for resident memory
    light = [replace(row, resident_mib=1.0) if row.method == "b" else row for row in rows]
    assert list(undominated(standins(frame(*light)))) == [True, True, True, False]


def test_larger_erasures_have_a_column():
    rows = [replace(BASE, task=task, erased=task, memory_mib=1.0) for task in "ab"]
    rows += [replace(row, erased="a+b", nda=0.5) for row in rows]
    assert standin_table(standins(frame(*rows)))["NDA 2 lost"].tolist() == ["50.00"]


def test_the_terminal_s_table_fits_80_columns_and_markup_stands_as_it_is(measure, capsys: pytest.CaptureFixture[str]):
    rows = [replace(row, task="[b]", erased="[b]") for seed in range(3) for row in measure(seed, tasks=("t",))[0]]
    rows = [replace(row, method=f"[red]{row.method}+rank16-4bit[/red]") for row in rows if row.method != "oracle"]
    print_standins(frame(*rows))
    text, _, sentence = capsys.readouterr().out.rstrip().rpartition("\n")
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    assert "…" not in text  # nothing is cut off
    assert "[red]average+" in text
    assert text.startswith("Experts, own accuracy in %: [b] 95.60 ± 0.00\n")
    assert sentence.startswith("Keep ")


def test_numbers_as_text():
    assert [percent(0.98024, 0.00314), percent(0.98024), percent(math.nan)] == ["98.02 ± 0.31", "98.02", "–"]
