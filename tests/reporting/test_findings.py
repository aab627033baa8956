"""What is said of made-up rows: only what is clear of the spread, and against whom."""

import re
from collections.abc import Iterable
from dataclasses import replace

import pandas as pd
import pytest

from coin.reporting.findings import (
    BASELINE,
    CLOSED_FORM,
    FLOOR,
    FOREIGN,
    STEPS,
    Findings,
    findings,
    paired_difference,
    paired_differences,
)
from coin.reporting.results import Row

BASE = Row(
    "x", 0, "coin", "auto:average", "linear", "0", "a", "a", 200, 0.9, 0.8, 0.9, 0.85, 0.5, 4.0, 8400.0, 0.2, 1200.0
)


def rows_of(method: str, ndas: list[float], **changes: object) -> list[Row]:
    """One row per seed."""
    return [
        replace(BASE, method=method, seed=seed, nda=nda, **changes)  # type: ignore[arg-type]
        for seed, nda in enumerate(ndas)
    ]


def found(*rows: list[Row]) -> Findings:
    return findings(pd.DataFrame([vars(row) for part in rows for row in part]))


def test_roles_are_the_best_of_each_kind_with_its_best_decoder():
    said = found(
        rows_of("none", [0.8] * 3, batchnorm="", code_row="", decoder="ridge"),
        rows_of("oracle", [1.0] * 3),
        rows_of("coin", [0.9] * 3),
        rows_of("coin", [0.97] * 3, decoder="ridge"),
        rows_of("refit", [0.96] * 3),
        rows_of("gauss_newton", [0.99] * 3),
        rows_of("distillation-200", [0.95] * 3),
        rows_of("readout_distillation", [0.98] * 3),
    )
    roles = {role: (entry.name, entry.decoder) for role, entry in said.roles.items()}
    assert roles == {
        CLOSED_FORM: ("coin", "ridge"),
        STEPS: ("gauss_newton", "linear"),
        BASELINE: ("readout_distillation", "linear"),
        FLOOR: ("none", "ridge"),
    }
    assert said.best is not None
    assert said.best.name == "gauss_newton"


def tells(lines: Iterable[str], *parts: str) -> bool:
    """Whether one line has all parts, in this order."""
    return any(re.search(".*".join(map(re.escape, parts)), line) for line in lines)


def test_a_role_is_of_what_a_method_is_whatever_its_label():
    rows = [
        rows_of("best-fisher", [0.9] * 3),
        rows_of("kd", [0.95] * 3, batchnorm="keep"),
        rows_of("average", [0.8] * 3),
        rows_of("slerp", [0.85] * 3, batchnorm=""),
    ]
    frame = pd.DataFrame([vars(row) for part in rows for row in part])
    said = findings(frame, kinds={"best-fisher": "coin", "kd": "distillation", "slerp": "user_method"})
    roles = {role: entry.name for role, entry in said.roles.items()}
    assert roles == {CLOSED_FORM: "best-fisher", BASELINE: "kd (keep)", FOREIGN: "slerp"}
    assert tells(said.significant_differences, "best-fisher (linear)", "10.00 ± 0.00", "above average (linear)")
    assert "minus kd (keep)" in paired_differences(said, "linear")
    assert BASELINE not in findings(frame).roles  # the label alone does not tell


@pytest.mark.parametrize(
    ("trained", "relation"),
    [
        ([0.90, 0.91, 0.92], "above 91.0 ± 1.0 % for distillation, the best trained method"),
        ([0.95, 0.93, 0.97], "not clearly apart from 95.0 ± 2.0 % for distillation"),
        ([0.96, 0.97, 0.98], "below 97.0 ± 1.0 % for distillation"),
    ],
)
def test_the_headline_says_best_baseline_and_floor_in_one_sentence(trained: list[float], relation: str):
    closed, none = [0.94, 0.95, 0.96], rows_of("none", [0.8, 0.81, 0.82], code_row="", batchnorm="")
    text = found(rows_of("coin", closed), rows_of("distillation", trained), none).headline
    assert text.startswith("When one of 1 experts is lost, coin, the best closed form, keeps 95.0 ± 1.0 % of its acc")
    assert relation in text
    assert text.endswith("81.0 ± 1.0 % without a coded model.")
    assert text.count(". ") == 0


def test_the_headline_where_parts_are_missing():
    none = rows_of("none", [0.8], code_row="", batchnorm="")
    assert "the survivors alone keep 80.0 %" in found(none).headline
    assert "distillation, the best trained, keeps 90.0 %" in found(rows_of("distillation", [0.9]), none).headline
    assert "against 80.0 % without a coded model" in found(rows_of("coin", [0.9]), none).headline
    assert found(rows_of("oracle", [1.0])).headline.endswith(" lost, there is no coded model.")


@pytest.mark.parametrize(
    ("differences", "sign"),
    [
        ([-0.02, -0.01, -0.03], 0),  # 2.00 points against 4.303 · 1.00 / √3 = 2.48
        ([-0.02, -0.02, -0.02], -1),
        ([-0.02, 0.01, -0.01], 0),
        ([-0.03, -0.01, 0.0, -0.01], 0),  # 4.30 and 3.18 standard errors, not 2
        ([-0.02, -0.01, -0.01, -0.015], -1),
        ([0.02, 0.02, 0.021], 1),
        ([0.5, 0.5], None),  # two seeds cannot tell
        ([0.0, 0.0, 0.0], 0),
    ],
)
def test_a_difference_is_clear_by_a_paired_interval(differences: list[float], sign: int | None):
    # The seeds themselves differ by far more: they are compared one by one.
    seeds = [0.90, 0.70, 0.80, 0.60][: len(differences)]
    ours = [nda + difference for nda, difference in zip(seeds, differences, strict=True)]
    said = found(rows_of("average", seeds), rows_of("coin", ours))
    average, coin = said.entries
    mean, _, found_sign = paired_difference(coin, average)
    assert mean == pytest.approx(sum(differences) / len(differences))
    assert found_sign == sign
    table = paired_differences(said, "linear")
    assert list(table.columns) == ["method", "minus average", "minus coin"]
    assert table.loc[1, "minus average"].endswith("*") == bool(sign)
    assert table.loc[1, "minus average"].startswith(f"{100 * mean:+.2f} ± ")
    assert table.loc[0, "minus average"] == "–"
    assert any("coin (linear) is" in text and "average" in text for text in said.significant_differences) == bool(sign)


def test_findings_are_five_at_most_and_speak_against_a_method_too():
    said = found(
        rows_of("none", [0.8, 0.81, 0.82], code_row="", batchnorm="", decoder="ridge"),
        rows_of("average", [0.70, 0.71, 0.72]),
        rows_of("average", [0.90, 0.91, 0.92], decoder="ridge"),
        rows_of("coin", [0.60, 0.61, 0.62]),
        rows_of("coin", [0.95, 0.96, 0.97], decoder="ridge"),
        [replace(row, merge_seconds=30.0) for row in rows_of("distillation", [0.98, 0.991, 1.0], decoder="ridge")],
    )
    assert len(said.significant_differences) == 5
    first, second, *_ = said.significant_differences
    assert tells([first], "coin (ridge)", "3.03 ± 0.06", "below distillation (ridge)", "4.2 s")
    assert tells([second], "15.00 ± 0.00", "above none (ridge)")
    assert tells(said.significant_differences, "coin (linear)", "10.00 ± 0.00", "below average (linear)")
    level = found(rows_of("average", [0.96, 0.98, 0.97]), rows_of("coin", [0.97, 0.96, 0.98]))
    pairs = "coin (linear) against average (linear), coin (linear) against the 97.5 % (paper, in some cases)"
    (line,) = level.significant_differences
    assert tells([line], "None", pairs)
    for alone in (rows_of("refit", [0.9, 0.91, 0.92]), rows_of("none", [0.8] * 3), rows_of("oracle", [1.0] * 3)):
        assert found(alone).significant_differences == ()  # nothing was compared


def test_the_paper_s_figure_is_compared_with_coin_and_the_linear_decoder():
    (text,) = found(rows_of("coin", [0.96, 0.961, 0.962])).significant_differences
    assert tells([text], "coin (linear)", "1.40 ± 0.10", "below the 97.5 %")


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_or_two_seeds_find_nothing_and_say_so(seeds: int):
    said = found(rows_of("average", [0.9] * seeds), rows_of("coin", [0.5] * seeds))
    assert said.significant_differences == ()
    (caution,) = said.cautions
    assert caution.startswith(f"{('One seed', 'Two seeds')[seeds - 1]} only: ")
    assert ("±" in said.headline) == (seeds == 2)


def test_cautions():
    assert any("do not trust" in text for text in found(rows_of("oracle", [0.95] * 3)).cautions)
    assert not found(rows_of("oracle", [1.0] * 3), rows_of("coin", [0.9] * 3)).cautions
    broken = found(rows_of("coin", [0.9, float("nan"), 0.9]), rows_of("ties", [0.1] * 3))
    assert "for: coin." in broken.cautions[0]
    assert broken.roles[CLOSED_FORM].name == "ties"  # what is not defined is not the best


def test_where_nothing_is_defined_the_headline_says_why():
    nan = float("nan")
    none, coin = rows_of("none", [nan], code_row="", batchnorm=""), rows_of("coin", [nan])
    assert tells([found(none, coin).headline], "one of 1", "not defined", "never right")
    assert tells([found(none).headline], "never right", "no coded model")


def test_only_the_p_of_most_methods_and_the_smallest_loss_are_compared():
    rows = [
        *rows_of("coin", [0.9] * 3), *rows_of("average", [0.8] * 3),
        *rows_of("distillation-7000", [0.99] * 3, samples_per_task=7000),
        *rows_of("ties", [0.99] * 3, erased="a+b"), *rows_of("ties", [0.7] * 3, task="b", erased="b"),
    ]  # fmt: skip
    said = found(rows)
    assert {entry.name for entry in said.entries} == {"coin", "average", "ties"}
    (caution,) = said.cautions
    assert tells([caution], "P = 200", "distillation-7000 (P = 7000)")
    assert said.best is not None
    assert said.best.name == "coin"
