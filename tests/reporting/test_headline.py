"""What is said of made-up rows: only what is clear of the spread, and against whom."""

import math
from dataclasses import replace

import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from coin.reporting.headline import (
    BASELINE,
    CODED,
    COPIES,
    FLOOR,
    Entry,
    cautions,
    difference,
    differences,
    entries,
    headline,
)
from coin.reporting.results import Row

BASE = Row(
    "x", 0, "coin", "auto:average", "linear", "0", "a", "a", 200, 0.9, 0.8, 0.9, 0.85, 0.5, 4.0, 8400.0, 0.2, 1200.0
)
NONE = {"batchnorm": "", "code_row": ""}


def rows_of(method: str, ndas: list[float], **changes: object) -> list[Row]:
    """One row per seed."""
    return [
        replace(BASE, method=method, seed=seed, nda=nda, **changes)  # type: ignore[arg-type]
        for seed, nda in enumerate(ndas)
    ]


def frame_of(*rows: list[Row]) -> pd.DataFrame:
    return pd.DataFrame([vars(row) for part in rows for row in part])


def found(*rows: list[Row], kinds: dict[str, str] | None = None) -> list[Entry]:
    return entries(frame_of(*rows), kinds or {})


def said(*rows: list[Row]) -> str:
    return headline(found(*rows), 2)


def test_entries_are_variants_with_their_best_decoder_and_their_role_whatever_the_label():
    told = found(
        rows_of("none", [0.8] * 3, decoder="ridge", **NONE),
        rows_of("oracle", [1.0] * 3),
        rows_of("coin", [0.9] * 3),
        rows_of("coin", [0.97] * 3, decoder="ridge"),
        rows_of("kd", [0.95] * 3, batchnorm="keep"),
        rows_of("distillation-200", [0.94] * 3),
        rows_of("replica-3bit", [0.99] * 3, decoder="replica", batchnorm=""),
        rows_of("ties", [math.nan] * 3),
        rows_of("distillation-long", [0.98] * 3, samples_per_task=7000),  # of another P: no fair baseline
        kinds={"kd": "distillation", "replica-3bit": "replica"},
    )
    assert [(each.name, each.decoder, each.role) for each in told] == [
        ("replica-3bit", "replica", COPIES),
        ("coin", "ridge", CODED),
        ("kd (keep)", "linear", BASELINE),
        ("distillation-200", "linear", BASELINE),
        ("none", "ridge", FLOOR),
    ]


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


GAINS = (
    [-0.02, -0.01, -0.03],
    [-0.02] * 3,
    [-0.03, -0.01, 0.0, -0.01],
    [0.02, 0.02, 0.021],
    [0.5, 0.499],
    [0.5],
    [0.0] * 3,
)


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
    told = cautions(frame_of(rows_of("coin", [0.9]), rows_of("oracle", [0.9]), rows_of("ties", [math.nan])))
    assert [text.partition(" ")[0] for text in told] == ["One", "The", "NDA"]
    assert "has 90.00 %: do not trust" in told[1]
    assert told[2].endswith("for: ties.")
    assert cautions(frame_of(rows_of("coin", [0.9, 0.8]), rows_of("oracle", [1.0, 1.0]))) == []
