"""The table of stand-ins, in text and in a terminal of 80 columns."""

import math

import pytest

from coin.reporting import standin_table, standins
from coin.reporting.choice import shortlist, undominated
from coin.reporting.tables import percent, print_standins
from tests.reporting.conftest import frame, measured, row

A = {"method": "a", "memory_mib": 10.0, "resident_mib": 11.0, "forwards": 2.0}
LARGER = {**A, "method": "b", "memory_mib": 12.0}
ALONE = {**A, "method": "b", "decoder": "expert_head", "forwards": 1.0, "losses": 2.0}
SIZES = {"memory_mib": 1234.0, "resident_mib": 1234.0, "forwards": 3.0}
LARGE = {**SIZES, "method": "c", "decoder": "expert_head"}
KEPT = [row(0.99, **A), row(0.99, **LARGER), row(0.97, **ALONE), row(0.95, **LARGE)]


def test_the_table_is_ordered_by_cost_and_marks_what_no_other_beats():
    kept = standins(frame(KEPT))
    assert kept.memory_mib.tolist() == [10, 10, 12, 1234]
    assert kept.method.tolist() == ["b", "a", "b", "c"]
    assert undominated(kept).tolist() == [True, True, False, False]
    # b's best decoder is beaten, and shown.
    assert shortlist(kept).tolist() == [False, True, True, True]
    *_, second, _, last = standin_table(kept).to_numpy().tolist()
    assert " ".join(second[:8]) == "a linear 99.00* 99.00 10 11 2 1"
    assert " ".join(last) == "c expert_head 95.00 95.00 1,230 1,230 3 1 85.00 4.0 8,000"
    assert standin_table(kept[:0]).empty


@pytest.mark.parametrize(
    ("changes", "is_kept"),
    [
        ({}, True),  # as good in all
        ({"nda": 0.991}, True),
        ({"memory_mib": 9.0}, True),
        ({"resident_mib": 10.0}, True),
        ({"forwards": 1.0}, True),
        ({"losses": 2.0}, True),
        ({"resident_mib": 12.0}, False),
        ({"memory_mib": 10.001}, True),  # which is printed alike
        ({"memory_mib": 9.0, "forwards": 3.0, "resident_mib": math.nan}, False),
    ],
)
def test_every_quantity_counts(changes, is_kept):
    own = {**A, "method": "other", "nda": 0.99, **changes}
    other = row(**own)
    kept = standins(frame([KEPT[0], other]))
    stars = dict(zip(kept.method, undominated(kept), strict=True))
    assert stars["other"] is is_kept


def test_larger_erasures_have_a_column():
    rows = [row(0.9, "a"), row(0.9, "b"), row(0.5, "a", erased="a+b"), row(0.5, "b", erased="a+b")]
    assert standin_table(standins(frame(rows)))["NDA 2 lost"].tolist() == ["50.00"]


def test_the_terminals_table_fits_80_columns_and_markup_stands_as_it_is(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    rows = frame([each for seed in range(3) for each in measured(seed)])
    rows = rows[rows.method != "oracle"].replace("a", "[b]")
    rows["method"] = "[red]" + rows.method + "+rank16-4bit[/red]"
    print_standins(rows)
    printed = capsys.readouterr().out
    *table, sentence = printed.splitlines()
    assert max(map(len, table)) <= 80
    assert "\x1b" not in printed
    assert "…" not in "".join(table)  # nothing is cut off
    assert "[red]average+" in printed
    assert table[0] == "Experts, own accuracy in %: [b] 90.00 ± 0.00, b 90.00 ± 0.00"
    assert sentence.startswith("Keep ")


@pytest.mark.parametrize(
    ("mean", "spread", "text"),
    [(0.98024, 0.00314, "98.02 ± 0.31"), (0.98024, math.nan, "98.02"), (math.nan, math.nan, "–")],
)
def test_shares_are_in_percent(mean, spread, text):
    assert percent(mean, spread) == text
