"""Tables of NDA, in text and a terminal of 80 columns, and what is said of them: only what is clear of the spread."""

import math
import re
from dataclasses import replace
from io import StringIO
from itertools import chain

import pandas as pd
import pytest
from rich.console import Console
from scipy.stats import ttest_1samp

from coin.reporting import headline, nda_tables, summarise, tables
from coin.reporting.choice import shortlist
from coin.reporting.extras import PROMISE_COLUMNS
from coin.reporting.headline import Entry, cautions, difference, differences, entries
from coin.reporting.results import Row
from coin.reporting.summary import stand_ins, undominated
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
    assert list(table["P"]) == ["50", "200"] * 2
    assert list(table["linear"]) == ["50.00*", "90.00*"] * 2


def test_the_survivors_alone_are_starred_where_they_are_best_and_the_oracle_is_not():
    rows = [replace(BASE, decoder="ridge", nda=0.9), replace(BASE, method="oracle", decoder="ridge", nda=1.0)]
    rows += [replace(BASE, method="none", decoder="ridge", nda=0.95, **NONE)]
    (table,) = nda_tables(summarise(frame(*rows))).values()
    assert dict(zip(table["method"], table["ridge"], strict=True)) == {
        "coin": "90.00", "none": "95.00*", "oracle": "100.00",
    }  # fmt: skip
    assert list(table["NDA"]) == list(table["ridge"])


def test_the_table_fits_80_columns_with_the_winning_decoder_in_it(measure):
    rows = [row for seed in range(3) for samples in (50, 1000) for row in measure(seed, samples=samples)[0]]
    names = {"linear": "linear", "ridge": "ridge-alone", "feature_ridge": "feature_ridge-64-random-own"}
    rows = [replace(row, decoder=names[row.decoder]) for row in rows]
    rows += [replace(row, decoder=f"ridge-{i}", nda=0.5) for row in rows if row.decoder == "linear" for i in range(9)]
    summary = summarise(frame(*rows))
    (table,) = nda_tables(summary).values()
    text = printed(summary)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    assert "…" not in text  # nothing is cut off
    assert table.loc[1, "decoder"] == names["feature_ridge"]
    assert table.loc[1, "NDA"] in next(line for line in text.splitlines() if "average" in line and "1000" in line)
    assert "ridge-8" in text.partition("Not shown: ")[2]


def test_a_wide_terminal_has_all_and_markup_in_a_name_stands_as_it_is(measure):
    rows = [replace(row, experiment="[red]x[/red]", task="[b]", erased="[b]") for row in measure(0, tasks=("t",))[0]]
    text = printed(summarise(frame(*rows)), 160)
    assert "Not shown" not in text
    assert "[red]x[/red]: NDA in %, 1 of 1 lost" in text
    assert "Experts, own accuracy in %: [b] 95.60" in text
    assert "passes" in text
    for width in range(12, 40):  # a number that is cut for a narrow one says so
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
    assert list(table)[1:] == ["given", "at most", "coverage promised", "coverage", "found"]
    # 0.9 and 0.3 of two test sets are accepted, of which 0.01 and 0.03 differ
    assert table.iloc[0].tolist()[1:] == ["2 of 3", "2.00", "40.00", "40.00", "1.50"]


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


def test_resident_memory_counts_and_is_left_out_where_none_was_measured():
    rows = stand_in_rows()
    heavy = [replace(row, resident_mib=50.0) if row.method == "b" else row for row in rows]
    kept = stand_ins(summarise(frame(*heavy, *(replace(row, method="d", resident_mib=60.0) for row in heavy[:2]))))
    assert not dict(zip(kept["name"], undominated(kept), strict=True))["d"]  # b is equal but for resident memory
    light = [replace(row, resident_mib=1.0) if row.method == "b" else row for row in rows]
    kept = stand_ins(summarise(frame(*light)))
    assert list(undominated(kept)) == [True, True, True, False]  # less resident memory than what is else as good
    old = [replace(row, resident_mib=math.nan) for row in rows]
    kept = stand_ins(summarise(frame(*old)))
    assert list(undominated(kept)) == [True, True, False, False]
    assert "resident MiB" not in stand_in_table(kept)
    mixed = stand_ins(summarise(frame(*old[:2], *rows[2:])))
    assert list(stand_in_table(mixed)["resident MiB"]) == ["–", "11", "11", "1,234"]


def test_the_table_of_what_to_keep_fits_80_columns_with_both_memories():
    names = ["none", "replica-3bit-int8base", "refit+rank16-4bit", "distillation"]
    kept = stand_ins(summarise(frame(*stand_in_rows()))).assign(name=names, decoder="feature_ridge")
    for spread in (math.nan, 0.01):
        console = Console(width=80, file=StringIO())
        console.print(tables.keep_table(kept.assign(nda_std=spread), "quickstart", console))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert max(len(line) for line in text.splitlines()) <= 80
        assert "memory resident" in text
        assert "merge s" not in text
        assert "…" not in text
    console = Console(width=120, file=StringIO())
    console.print(tables.keep_table(kept, "quickstart", console))
    assert "merge s" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_finding_is_what_is_recommended_and_no_stand_in_keeps_more_than_all():
    columns = ["name", "decoder", "nda_mean", "nda_worst", "memory_mib", "forwards", "losses"]
    rows = [
        ("none", "ridge", 0.4, 0.3, 0.1, 2, 1), ("small", "expert_head", 0.985, 0.975, 2, 1, 2),
        ("middle", "linear", 0.985, 0.982, 4, 3, 1), ("large", "linear", 1.03, 0.99, 9, 3, 1),
    ]  # fmt: skip
    kept = pd.DataFrame(rows, columns=columns).assign(nda_std=0.0, resident_mib=math.nan, weak_task="")
    told = r"middle with linear .* 98\.5 % .* 4 MiB; .* 3 network runs, .* 1 expert .*; the survivors .* 40\.0 %"
    assert re.search(told, tables.finding(kept))
    assert re.search(r"large with linear keeps 100\.0 % .* 9 MiB", tables.finding(kept[kept["name"] != "middle"]))
    assert "small with expert_head keeps" in tables.finding(kept.head(2))  # none is accurate enough: the most accurate
    far = kept.head(1).assign(name="average", nda_mean=2.857)
    assert not re.search(r"\d", tables.finding(far))  # weaker than what replaces them: no number of what is none
    copies = kept.head(1).assign(name="replica-3bit", decoder="replica", memory_mib=2, forwards=1, losses=2)
    assert re.search(r" 2 MiB; .* 1 network run, .* 2 experts", tables.finding(copies))
    alone = r"In short: the survivors alone with ridge keep 40\.0 % .* 0\.1 MiB; .* 1 expert may be lost at once\."
    assert re.fullmatch(alone, tables.finding(kept.head(1)))


NONE = {"batchnorm": "", "code_row": ""}


def rows_of(method: str, ndas: list[float], **changes: object) -> list[Row]:
    """One row per seed."""
    return [replace(BASE, method=method, seed=seed, nda=nda, **changes) for seed, nda in enumerate(ndas)]  # type: ignore


def found(*rows: list[Row], kinds: dict[str, str] | None = None) -> list[Entry]:
    return entries(frame(*chain(*rows)), kinds or {})


def said(*rows: list[Row]) -> str:
    return headline.headline(found(*rows), 2)


def test_entries_are_variants_with_their_best_decoder_and_their_role_whatever_the_label():
    told = found(
        rows_of("none", [0.8] * 3, decoder="ridge", **NONE), rows_of("oracle", [1.0] * 3), rows_of("coin", [0.9] * 3),
        rows_of("coin", [0.97] * 3, decoder="ridge"), rows_of("kd", [0.95] * 3, batchnorm="keep"),
        rows_of("distillation-200", [0.94] * 3), rows_of("ties", [math.nan] * 3),
        rows_of("replica-3bit", [0.99] * 3, decoder="replica", batchnorm=""),
        rows_of("distillation-long", [0.98] * 3, samples_per_task=7000),  # of another P: no fair baseline
        kinds={"kd": "distillation", "replica-3bit": "replica"},
    )  # fmt: skip
    assert [(each.name, each.decoder, each.role) for each in told] == [
        ("replica-3bit", "replica", headline.COPIES), ("coin", "ridge", headline.CODED),
        ("kd", "linear", headline.BASELINE), ("distillation-200", "linear", headline.BASELINE),
        ("none", "ridge", headline.FLOOR),
    ]  # fmt: skip


def test_the_headline_says_best_baseline_and_floor_in_one_sentence():
    closed, none = rows_of("coin", [0.94, 0.95, 0.96]), rows_of("none", [0.8, 0.81, 0.82], **NONE)
    for trained, relation in (
        ([0.90, 0.91, 0.92], "above 91.0 ± 1.0 % for distillation, the best trained method"),
        ([0.95, 0.93, 0.97], "not clearly apart from 95.0 ± 2.0 % for distillation"),
        ([0.96, 0.97, 0.98], "below 97.0 ± 1.0 % for distillation"),
    ):
        text = said(closed, rows_of("distillation", trained), none)
        assert text.startswith("When one of 2 experts is lost, coin keeps 95.0 ± 1.0 % of its accuracy with the linear")
        assert relation in text
        assert text.endswith("81.0 ± 1.0 % without a coded model.")
        assert text.count(". ") == 0


def test_the_headline_where_parts_are_missing():
    none = rows_of("none", [0.8], **NONE)
    assert "the survivors alone keep 80.0 % of its accuracy; there is no coded model" in said(none)
    assert "distillation keeps 90.0 % of its accuracy" in said(rows_of("distillation", [0.9]), none)
    copies = rows_of("replica", [0.9], decoder="replica")
    text = said(rows_of("coin", [0.9]), copies, none)  # one seed: nothing is tested, and it is said once
    assert text.endswith(", against 90.0 % for replica, compressed experts, and 80.0 % without a coded model.")
    assert "nothing keeps" in said(rows_of("oracle", [1.0]))


GAINS = [-0.02, -0.01, -0.03], [-0.02] * 3, [-0.03, -0.01, 0.0, -0.01], [0.02, 0.02, 0.021]
GAINS += [0.5, 0.499], [0.5], [0.0] * 3


@pytest.mark.parametrize("gains", GAINS)
def test_a_difference_is_paired_by_seed(gains: list[float]):
    # The seeds themselves differ by far more: they are compared one by one.
    seeds = [0.90, 0.70, 0.80, 0.60][: len(gains)]
    ours = [nda + gain for nda, gain in zip(seeds, gains, strict=True)]
    told = found(rows_of("average", seeds), rows_of("coin", ours))
    coin, average = sorted(told, key=lambda each: each.name == "average")
    mean, _, p = difference(coin, average)
    assert mean == pytest.approx(sum(gains) / len(gains))
    if len(gains) == 1:
        assert math.isnan(p)
        assert differences(told).empty
        return
    same = len({round(gain, 9) for gain in gains}) == 1  # no spread to test with
    assert p == pytest.approx(float(gains[0] == 0) if same else ttest_1samp(gains, 0).pvalue, abs=1e-9)
    (cell,) = differences(told)[f"minus {told[0].name}"]
    assert cell.startswith(f"{-100 * abs(mean) or 0.0:+.2f} ± ")
    assert cell.endswith("*") == (p < 0.05)


def test_cautions_are_of_few_seeds_of_the_oracle_and_of_what_is_not_defined():
    told = cautions(frame(*rows_of("coin", [0.9]), *rows_of("oracle", [0.9]), *rows_of("ties", [math.nan])))
    assert [text.partition(" ")[0] for text in told] == ["One", "The", "NDA"]
    assert "has 90.00 %: do not trust" in told[1]
    assert told[2].endswith("for: ties.")
    assert cautions(frame(*rows_of("coin", [0.9, 0.8]), *rows_of("oracle", [1.0, 1.0]))) == []
