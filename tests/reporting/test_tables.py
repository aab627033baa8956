"""Tables of NDA, in text and a terminal of 80 columns."""

import math
import re
from dataclasses import replace
from io import StringIO

import pandas as pd
from rich.console import Console

from coin.reporting import nda_tables, summarise, tables
from coin.reporting.choice import shortlist, undominated
from coin.reporting.results import PROMISE_COLUMNS, Row
from coin.reporting.summary import stand_ins
from coin.reporting.tables import percent, rich_table, seconds, stand_in_table
from tests.reporting.conftest import BASE, frame


def printed(summary: pd.DataFrame, width: int = 80) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)  # what a pipe receives
    with console.capture() as capture:
        tables.print_summary(summary, console)
    return capture.get()


def test_a_table_has_a_line_a_variant_the_references_last_and_the_best_starred(measure):
    summary = summarise(frame(*(row for seed in (0, 1) for row in measure(seed)[0])))
    ((key, table),) = nda_tables(summary).items()
    assert key == "1 of 2"
    # Every method's best decoder comes first, so that no table begins with a column of dashes; then linear, the winner.
    assert list(table.columns)[:5] == ["method", "NDA", "decoder", "linear", "feature_ridge"]
    assert list(table["decoder"])[::4] == ["feature_ridge", "feature_ridge"]
    for line in table.to_dict("records"):
        assert line["NDA"].strip("*") == line[line["decoder"]].strip("*") != "–"
    assert list(table["method"]) == ["average", "coin", "coin-recalibrate", "distillation", "none", "oracle"]
    means = summary[summary["task"] == "mean"]
    for decoder in ("linear", "ridge", "feature_ridge"):
        part = means[(means["decoder"] == decoder) & (means["method"] != "oracle")]
        top = part.loc[part["nda_mean"].idxmax()]
        (starred,) = [cell for cell in table[decoder] if cell.endswith("*")]
        assert starred == f"{100 * top['nda_mean']:.2f} ± {100 * top['nda_std']:.2f}*"
    assert table.loc[4, "linear"] == "–"
    assert list(table.loc[3, ["merge passes", "decoder passes"]]) == ["57,600", "1,200"]


def test_means_that_print_alike_are_starred_alike_and_samples_have_a_column():
    rows = [replace(BASE, nda=0.900001), replace(BASE, method="average", nda=0.899999)]
    rows += [replace(row, samples_per_task=50, nda=0.5) for row in rows]
    (table,) = nda_tables(summarise(frame(*rows))).values()
    assert list(table["P"]) == ["200", "200", "50", "50"]
    assert list(table["linear"]) == ["90.00*", "90.00*", "50.00*", "50.00*"]


def test_the_survivors_alone_are_starred_where_they_are_best_and_the_oracle_is_not():
    rows = [replace(BASE, decoder="ridge", nda=0.9), replace(BASE, method="oracle", decoder="ridge", nda=1.0)]
    rows += [replace(BASE, method="none", decoder="ridge", nda=0.95, batchnorm="", code_row="")]
    (table,) = nda_tables(summarise(frame(*rows))).values()
    assert dict(zip(table["method"], table["ridge"], strict=True)) == {
        "coin": "90.00", "none": "95.00*", "oracle": "100.00",
    }  # fmt: skip
    assert list(table["NDA"]) == list(table["ridge"])


def test_the_table_fits_80_columns_with_the_winning_decoder_in_it(measure):
    rows = [row for seed in range(3) for samples in (50, 1000) for row in measure(seed, samples=samples)[0]]
    names = {"linear": "linear", "ridge": "ridge", "feature_ridge": "feature_ridge-64-random-own"}
    rows = [replace(row, decoder=names[row.decoder]) for row in rows]
    rows += [replace(row, decoder=f"ridge-{i}", nda=0.5) for row in rows if row.decoder == "linear" for i in range(9)]
    summary = summarise(frame(*rows))
    (table,) = nda_tables(summary).values()
    text = printed(summary)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    assert "…" not in text  # nothing is cut off
    (row,) = table[(table["method"] == "average") & (table["P"] == "1000")].to_dict("records")
    assert row["decoder"] == names["feature_ridge"]
    assert row["NDA"] in next(line for line in text.splitlines() if "average" in line and "1000" in line)


def test_markup_in_a_name_stands_as_it_is_and_a_number_that_is_cut_says_so(measure):
    rows = [replace(row, experiment="[red]x[/red]", task="[b]", erased="[b]") for row in measure(0, tasks=("t",))[0]]
    text = printed(summarise(frame(*rows)), 160)
    assert "[red]x[/red]: NDA in %, 1 of 1 lost" in text
    assert "Experts, own accuracy in %: [b] 95.60" in text
    for width in range(12, 40):
        console = Console(width=width, record=True, file=StringIO())
        console.print(rich_table(pd.DataFrame({"method": ["refit feature_ridge"], "server MiB": ["102400"]}), "t"))
        numbers = re.findall(r"\b1[0-9]*…?", console.export_text())
        assert [number for number in numbers if number == "102400" or number.endswith("…")] == numbers


def test_numbers_and_names_as_text():
    assert [seconds(value) for value in (0.0, 31.06, 12345.0, math.nan)] == ["0.0", "31.1", "12,345", "–"]
    assert [percent(0.98024, 0.00314), percent(0.98024), percent(math.nan)] == ["98.02 ± 0.31", "98.02", "–"]
    found = rich_table(pd.DataFrame(columns=["a_longer_name-own", "merge s"]), "")
    assert [str(each.header) for each in found.columns] == ["a_longer_name-\nown", "merge s"]


def test_promises_over_tasks_and_seeds_by_hand():
    key, about = ["x", 0, "coin", "auto:keep", "linear", "0", "a", "a", 200], [0.02, 0.95, 400, 149]
    lines = [[*key, *about, 0.3, 0.8, 0.9, 0.01], [*key, *about, 0.2, 0.4, 0.3, 0.03]]
    lines += [[*key, *about, math.nan, 0.0, 0.0, math.nan]]
    table = tables.promise_table(pd.DataFrame(lines, columns=list(PROMISE_COLUMNS)))
    assert list(table)[2:] == ["given", "at most", "coverage promised", "coverage", "found"]
    # 0.9 and 0.3 of two test sets are accepted, of which 0.01 and 0.03 differ
    assert table.iloc[0].tolist()[2:] == ["2 of 3", "2.00", "40.00", "40.00", "1.50"]


def stand_in_rows() -> list[Row]:
    """Four systems: two that others beat, in one quantity or in all; the oracle; one of results from before."""
    kept = {"memory_mib": 10.0, "resident_mib": 11.0, "forwards": 2.0, "losses": 1.0}
    large = {"memory_mib": 1234.0, "resident_mib": 1234.0, "forwards": 3.0, "losses": 1.0}
    rows = [
        replace(BASE, nda=0.99, method="a", **kept),
        replace(BASE, nda=0.99, method="b", **{**kept, "memory_mib": 12.0}),
        replace(BASE, nda=0.97, method="b", decoder="expert_head", **{**kept, "forwards": 1.0, "losses": 2.0}),
        replace(BASE, nda=0.95, method="c", decoder="expert_head", **large),
        replace(BASE, nda=1.0, method="oracle"),
        replace(BASE, nda=0.9, method="old"),
    ]
    return [replace(row, task=task, erased=task) for row in rows for task in "pq"]


def test_what_to_keep_is_told_by_memory_and_the_undominated_ones_are_marked():
    kept = stand_ins(summarise(frame(*stand_in_rows())))
    assert list(zip(kept["name"], kept["memory_mib"], strict=True)) == [("a", 10), ("b", 10), ("b", 12), ("c", 1234)]
    assert list(undominated(kept)) == [True, True, False, False]
    assert list(shortlist(kept)) == [True, True, True, True]  # b's best decoder is beaten, and shown
    table = stand_in_table(kept)
    merging = seconds(BASE.merge_seconds)
    assert table.loc[0].tolist() == ["a", "linear", "99.00*", "10", "11", "2", "1", merging]
    assert table.loc[3].tolist() == ["c", "expert_head", "95.00", "1,234", "1,234", "3", "1", merging]
    alone = stand_in_table(kept.assign(name="none"))  # the survivors alone are starred by the same rule
    assert list(alone["NDA"]) == list(table["NDA"])
    below = printed(summarise(frame(*stand_in_rows()))).partition("what to keep")[2]
    assert below.count("*") == 3  # two rows' and the sentence's
    assert "95.00" in below


def test_resident_memory_counts():
    rows = stand_in_rows()
    heavy = [replace(row, resident_mib=50.0) if row.method == "b" else row for row in rows]
    kept = stand_ins(summarise(frame(*heavy, *(replace(row, method="d", resident_mib=60.0) for row in heavy[:2]))))
    assert not dict(zip(kept["name"], undominated(kept), strict=True))["d"]  # b is equal but for resident memory
    light = [replace(row, resident_mib=1.0) if row.method == "b" else row for row in rows]
    kept = stand_ins(summarise(frame(*light)))
    assert list(undominated(kept)) == [True, True, True, False]  # less resident memory than what is else as good


def test_the_table_of_what_to_keep_fits_80_columns_with_both_memories():
    names = ["none", "replica-3bit-int8base", "refit+rank16-4bit", "distillation"]
    kept = stand_ins(summarise(frame(*stand_in_rows()))).assign(name=names, decoder="feature_ridge", nda_std=0.01)
    console = Console(width=80, file=StringIO())
    console.print(tables.keep_table(kept, "quickstart"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "memory resident" in text
    assert "…" not in text
