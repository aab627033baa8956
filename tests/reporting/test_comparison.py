import math
from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console

from coin.reporting import Row, print_summary, summarise
from coin.reporting.comparison import Cell, comparisons, expert_accuracies, percent, seconds, short, variant_names
from coin.reporting.table import summary_tables

BASE = Row(
    "x", 0, "coin", "auto:average", "linear", "0", "a", "a", 200, 0.9, 0.8, 8 / 9, 0.85, 0.5, 4.0, 8400.0, 0.2, 1200.0
)


def frame(*rows: Row) -> pd.DataFrame:
    return pd.DataFrame([vars(row) for row in rows])


def test_names_tell_variants_apart_and_stay_short():
    rows = [
        replace(BASE, method="none", batchnorm="", code_row=""),
        BASE,
        replace(BASE, batchnorm="recalibrate"),
        replace(BASE, method="distillation-own", batchnorm="keep"),
        replace(BASE, method="gauss_newton", batchnorm="average"),
        replace(BASE, method="regmean", batchnorm="auto:same"),
        replace(BASE, method="regmean", batchnorm="keep"),
        replace(BASE, method="gauss_newton", batchnorm=""),
    ]
    names = [
        "none", "coin", "coin (recalibrate)", "distillation-own", "gauss_newton (average)", "regmean",
        "regmean (keep)", "gauss_newton",
    ]  # fmt: skip
    assert list(variant_names(frame(*rows))) == names
    assert [variant_names(frame(row)).item() for row in rows] == names, "other methods have no say in a name"
    seeds = [replace(BASE, seed=seed, batchnorm=f"auto:{took}") for seed, took in enumerate(("average", "recalibrate"))]
    assert list(variant_names(frame(*seeds))) == ["coin", "coin"]


def test_names_give_the_code_rows_only_where_one_loss_is_read_out_by_several():
    larger = replace(BASE, erased="a+b", code_row="0+1")
    assert list(variant_names(frame(BASE, larger))) == ["coin", "coin"]
    assert list(variant_names(frame(BASE, replace(BASE, code_row="0+1")))) == ["coin[0]", "coin[0+1]"]


def test_the_best_of_each_decoder_is_marked_but_never_a_reference(measure):
    (comparison,) = comparisons(summarise(frame(*measure(0)[0])))
    assert comparison.decoders == ("linear", "ridge", "feature_ridge")
    assert [line.method for line in comparison.lines][-2:] == ["none", "oracle"]
    for decoder in comparison.decoders:
        contenders = [line for line in comparison.lines if not line.is_reference]
        top = max(line.cells[decoder].mean for line in contenders)
        for line in comparison.lines:
            if decoder in line.cells:
                is_top = not line.is_reference and round(line.cells[decoder].mean, 4) == round(top, 4)
                assert line.cells[decoder].best == is_top


def test_cells_that_print_alike_are_marked_alike():
    rows = [replace(BASE, nda=0.900001), replace(BASE, method="average", nda=0.899999)]
    (comparison,) = comparisons(summarise(frame(*rows)))
    assert [line.cells["linear"].best for line in comparison.lines] == [True, True]


def test_expert_accuracies_are_one_row_per_task(measure):
    experts = expert_accuracies(summarise(frame(*measure(0)[0], *measure(1)[0])))
    assert list(experts["task"]) == ["mnist", "letters"]
    assert list(experts["seeds"]) == [2, 2]
    assert list(experts["mean"]) == pytest.approx([0.956, 0.987])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (840, "840"), (8400, "8.4k"), (57600, "57.6k"), (1.2e6, "1.2M"), (44000, "44k"), (math.nan, "–")],
)
def test_short_counts(value: float, text: str):
    assert short(value) == text


def test_numbers_as_text():
    assert percent(Cell(0.98024, 0.00314)) == "98.02 ± 0.31"
    assert percent(Cell(0.98024, math.nan)) == "98.02"
    assert percent(Cell(math.nan, math.nan)) == "–"
    assert [seconds(value) for value in (0.0, 31.06, 12345.0, math.nan)] == ["0.0", "31.1", "12,345", "–"]


def printed(summary: pd.DataFrame) -> str:
    # A console that is no terminal: what a pipe receives.
    console = Console(width=100, force_terminal=False, color_system=None)
    with console.capture() as capture:
        print_summary(summary, console)
    return capture.get()


def test_the_table_fits_100_columns_and_reads_when_piped(measure):
    rows = [row for seed in range(3) for samples in (50, 1000) for row in measure(seed, samples=samples)[0]]
    rows += [replace(row, method="gauss_newton_long_label", batchnorm="recalibrate") for row in rows[8:14]]
    text = printed(summarise(frame(*rows)))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "\x1b" not in text
    assert "…" not in text  # nothing is cut off
    line = next(line for line in text.splitlines() if "distillation" in line)
    assert line.count("*") >= 1
    assert "95.60" in text


def test_more_decoders_than_fit_continue_in_a_further_table(measure):
    rows, _ = measure(0)
    rows += [replace(row, decoder=f"{row.decoder}_b") for row in rows]
    text = printed(summarise(frame(*rows)))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "feature_ridge_b" in text
    assert text.count("NDA, 1 of 2 lost") == 2


def test_long_names_of_decoders_break_at_their_hyphens(measure):
    rows, _ = measure(0)
    names = {
        "linear": "feature_ridge-stages-64-random-own",
        "ridge": "feature_ridge-stages-256-own",
        "feature_ridge": "feature_ridge-stages",
    }
    text = printed(summarise(frame(*(replace(row, decoder=names[row.decoder]) for row in rows))))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text
    assert text.count("feature_ridge-") == 3
    assert "random-own" in text
    assert text.count("NDA, 1 of 2 lost") == 1


def test_references_are_set_apart(measure):
    table = summary_tables(summarise(frame(*measure(0)[0])))[0]
    ends = [row.end_section for row in table.rows]
    assert ends == [False, False, False, True, False, False]


def test_markup_in_a_name_is_printed_as_it_stands(measure):
    rows = [replace(row, experiment="[red]x[/red]", task="[b]", erased="[b]") for row in measure(0, tasks=("t",))[0]]
    text = printed(summarise(frame(*rows)))
    assert "[red]x[/red]" in text
    assert "[b]" in text


def test_the_default_console_is_100_wide_when_piped(measure, capsys: pytest.CaptureFixture[str]):
    print_summary(summarise(frame(*measure(0)[0])))
    lines = capsys.readouterr().out.splitlines()
    assert any("passes" in line and "linear" in line for line in lines)
    assert max(map(len, lines)) <= 100
