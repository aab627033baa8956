"""Tables of NDA, as text and in a terminal of 80 columns."""

import math
import re
from dataclasses import replace
from io import StringIO

import pandas as pd
from rich.console import Console

from coin.reporting import nda_tables, summarise
from coin.reporting.extras import PROMISE_COLUMNS
from coin.reporting.results import Row
from coin.reporting.summary import shortlist, stand_ins, undominated
from coin.reporting.tables import (
    finding,
    heading,
    percent,
    print_summary,
    promise_table,
    rich_table,
    seconds,
    stand_in_table,
)

BASE = Row(
    "x", 0, "coin", "auto:average", "linear", "0", "a", "a", 200, 0.9, 0.8, 8 / 9, 0.85, 0.5, 4.0, 8400.0, 0.2, 1200.0
)


def frame(*rows: Row) -> pd.DataFrame:
    return pd.DataFrame([vars(row) for row in rows])


def printed(summary: pd.DataFrame, width: int = 80) -> str:
    # A console that is no terminal: what a pipe receives.
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        print_summary(summary, console)
    return capture.get()


def test_a_table_has_a_line_a_variant_the_references_last_and_the_best_starred(measure):
    summary = summarise(frame(*(row for seed in (0, 1) for row in measure(seed)[0])))
    ((key, table),) = nda_tables(summary).items()
    assert key == "1 of 2"
    # linear and the winner come first
    assert list(table.columns)[:3] == ["method", "linear", "feature_ridge"]
    assert list(table["method"]) == ["average", "coin", "coin (recalibrate)", "distillation", "none", "oracle"]
    means = summary[summary["task"] == "mean"]
    for decoder in ("linear", "ridge", "feature_ridge"):
        part = means[(means["decoder"] == decoder) & ~means["method"].isin(["none", "oracle"])]
        top = part.loc[part["nda_mean"].idxmax()]
        (starred,) = [cell for cell in table[decoder] if cell.endswith("*")]
        assert starred == f"{100 * top['nda_mean']:.2f} ± {100 * top['nda_std']:.2f}*"
    assert table.loc[4, "linear"] == "–"
    assert list(table.loc[3, ["merge passes", "decoder passes"]]) == ["57,600", "1,200"]


def test_means_that_print_alike_are_starred_alike_and_samples_have_a_column():
    rows = [replace(BASE, nda=0.900001), replace(BASE, method="average", nda=0.899999)]
    rows += [replace(row, samples_per_task=50, nda=0.5) for row in rows]
    (table,) = nda_tables(summarise(frame(*rows))).values()
    assert list(table["P"]) == ["50", "200"] * 2
    assert list(table["linear"]) == ["50.00*", "90.00*"] * 2


def test_the_table_fits_80_columns_with_the_winning_decoder_in_it(measure):
    rows = [row for seed in range(3) for samples in (50, 1000) for row in measure(seed, samples=samples)[0]]
    names = {"linear": "linear", "ridge": "ridge-own", "feature_ridge": "feature_ridge-64-random-own"}
    rows = [replace(row, decoder=names[row.decoder]) for row in rows]
    rows += [replace(row, decoder=f"ridge-{i}", nda=0.5) for row in rows if row.decoder == "linear" for i in range(9)]
    summary = summarise(frame(*rows))
    (table,) = nda_tables(summary).values()
    text = printed(summary)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    assert "…" not in text  # nothing is cut off
    assert table.columns[3] == names["feature_ridge"]
    assert table.iloc[1, 3] in next(line for line in text.splitlines() if "average" in line and "1000" in line)
    assert "ridge-8" in text.partition("Not shown: ")[2]


def test_a_number_that_is_cut_for_a_narrow_terminal_says_so():
    for width in range(12, 40):
        console = Console(width=width, record=True, file=StringIO())
        console.print(rich_table(pd.DataFrame({"method": ["refit feature_ridge"], "server MiB": ["102400"]}), "t"))
        numbers = re.findall(r"\b1[0-9]*…?", console.export_text())
        assert [number for number in numbers if number == "102400" or number.endswith("…")] == numbers


def test_a_wide_terminal_has_all_and_markup_in_a_name_stands_as_it_is(measure):
    rows = [replace(row, experiment="[red]x[/red]", task="[b]", erased="[b]") for row in measure(0, tasks=("t",))[0]]
    text = printed(summarise(frame(*rows)), 160)
    assert "Not shown" not in text
    assert "[red]x[/red]: NDA in %, 1 of 1 lost" in text
    assert "Experts, own accuracy in %: [b] 95.60" in text
    assert "passes" in text


def test_numbers_and_names_as_text():
    assert [seconds(value) for value in (0.0, 31.06, 12345.0, math.nan)] == ["0.0", "31.1", "12,345", "–"]
    assert [percent(0.98024, 0.00314), percent(0.98024), percent(math.nan)] == ["98.02 ± 0.31", "98.02", "–"]
    assert [heading("feature_ridge-64-own"), heading("merge passes")] == ["feature_ridge-\n64-\nown", "merge passes"]


def test_promises_over_tasks_and_seeds_by_hand():
    key, about = ["x", 0, "coin", "auto:keep", "linear", "0", "a", "a", 200], [0.02, 0.95, 400, 149]
    lines = [[*key, *about, 0.3, 0.8, 0.9, 0.01], [*key, *about, 0.2, 0.4, 0.3, 0.03]]
    lines += [[*key, *about, math.nan, 0.0, 0.0, math.nan]]
    (line,) = promise_table(pd.DataFrame(lines, columns=list(PROMISE_COLUMNS))).to_dict("records")
    # 0.9 and 0.3 of two test sets are accepted, of which 0.01 and 0.03 differ
    assert {name: cell for name, cell in line.items() if name != "method"} == {
        "given": "2 of 3", "at most": "2.00", "coverage promised": "40.00", "coverage": "40.00", "found": "1.50",
    }  # fmt: skip


def stand_in_rows() -> list[Row]:
    """Four systems: two that others beat, in one quantity or in all; the oracle; one of results from before."""
    kept = {"memory_mib": 10.0, "forwards": 2.0, "losses": 1.0}
    rows = [
        replace(BASE, nda=0.99, method="a", **kept),
        replace(BASE, nda=0.99, method="b", **{**kept, "memory_mib": 12.0}),
        replace(BASE, nda=0.97, method="b", decoder="expert_head", **{**kept, "forwards": 1.0, "losses": 2.0}),
        replace(BASE, nda=0.95, method="c", decoder="expert_head", memory_mib=1234.0, forwards=3.0, losses=1.0),
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
    assert table.loc[0].tolist() == ["a", "linear", "99.00*", "10", "2", "1", seconds(BASE.merge_seconds)]
    assert table.loc[3].tolist() == ["c", "expert_head", "95.00", "1,234", "3", "1", seconds(BASE.merge_seconds)]
    assert stand_in_table(kept, all_rows=False)["NDA"].tolist() == ["99.00", "97.00"]
    text = printed(summarise(frame(*stand_in_rows())))
    assert "what to keep" in text
    below = text.partition("what to keep")[2]
    assert "expert_head" in below
    assert "95.00" not in below
    assert max(map(len, text.splitlines())) <= 80


def test_the_finding_is_the_smallest_of_the_nearly_best():
    columns = ["name", "decoder", "nda_mean", "nda_std", "memory_mib", "forwards", "losses"]
    rows = [
        ("none", "ridge", 0.4, 0.0, 0.1, 2, 1),
        ("small", "expert_head", 0.975, 0.0, 2, 1, 2),
        ("middle", "linear", 0.985, 0.0, 4, 3, 1),
        ("large", "linear", 0.99, 0.0, 9, 3, 1),
        ("beaten", "linear", 0.984, 0.0, 4, 3, 1),
    ]
    kept = pd.DataFrame(rows, columns=columns)
    told = r"middle with linear .* 98\.5 % .* 4 MiB; .* 3 network runs, .* 1 expert .*; the survivors .* 40\.0 %"
    assert re.search(told, finding(kept))
    far = pd.DataFrame([("average", "linear", 2.857, 0.0, 2, 1, 2)], columns=columns)
    assert not re.search(r"\d", finding(far))  # weaker than what replaces them: no number of what is none
    copies = pd.DataFrame([("replica-3bit", "replica", 1.0, 0.0, 2, 1, 2)], columns=columns)
    assert re.search(r" 2 MiB; .* 1 network run, .* 2 experts", finding(copies))
