from dataclasses import replace

import pandas as pd
import pytest

from coin.reporting import Finding, Row, findings

BASE = Row(
    "x", 0, "coin", "auto:average", "linear", "0", "a", "a", 200, 0.9, 0.8, 0.9, 0.85, 0.5, 4.0, 8400.0, 0.2, 1200.0
)


def rows_of(method: str, ndas: list[float], **changes: object) -> list[Row]:
    """One row per seed."""
    return [
        replace(BASE, method=method, seed=seed, nda=nda, **changes)  # type: ignore[arg-type]
        for seed, nda in enumerate(ndas)
    ]


def said(rows: list[Row]) -> list[Finding]:
    (found,) = findings(pd.DataFrame([vars(row) for row in rows])).values()
    return found


def one(found: list[Finding], words: str) -> Finding:
    (item,) = [item for item in found if words in item.text]
    return item


def test_the_paper_s_accuracy_stands_beside_the_numbers_and_is_no_least():
    for ndas, above in (([0.97, 0.974, 0.98], 1), ([0.976, 0.98, 0.99], 3)):
        found = one(said(rows_of("coin", ndas)), "97.5 %")
        assert found.kind == "note"
        assert "above 97.5 % in some cases" in found.text
        assert f"({above} of 3 seeds above)" in found.text
    assert "97.47 ± 0.50 %" in one(said(rows_of("coin", [0.97, 0.974, 0.98])), "97.5 %").text


def test_the_paper_s_cost_is_held_against_the_numbers():
    coin = rows_of("coin", [0.9, 0.9, 0.9])

    def trained(*seconds: float, **changes: object) -> list[Row]:
        rows = rows_of("distillation", [0.95] * len(seconds), **changes)
        return [replace(row, merge_seconds=took) for row, took in zip(rows, seconds, strict=True)]

    found = one(said(coin + trained(30.0, 31.0, 29.0, merge_passes=57600.0, decoder_seconds=900.0)), "cheaper")
    assert found.kind == "holds"
    assert "4.0 against 30.0 s and 8,400 against 57,600 forward passes" in found.text
    assert one(said(coin + trained(3.0, 3.1, 2.9)), "cheaper").kind == "fails"
    # Within the spread, and over two seeds, nothing is decided.
    for seconds in ((1.0, 8.0, 4.0), (30.0, 31.0)):
        found = one(said(coin + trained(*seconds)), "cheaper")
        assert found.kind == "note"
        assert "Not decided here" in found.text


def test_claims_that_were_not_measured_are_not_judged():
    found = said(rows_of("average", [0.9]))
    assert "not tested" in one(found, "COIN was not measured").text
    assert all(item.kind != "holds" for item in found)
    assert "not tested" in one(said(rows_of("coin", [0.9])), "Distillation was not measured").text


@pytest.mark.parametrize(
    ("differences", "worse"),
    [
        ([-0.02, -0.01, -0.03], "coin by 2.00 ± 0.58 points"),
        ([-0.02, -0.02, -0.02], "coin by 2.00 ± 0.00 points"),
        ([-0.02, 0.01, -0.01], None),  # mean -0.67 points, two standard errors 1.76
        ([-0.02, -0.01, 0.0], None),  # mean -1.00, two standard errors 1.15
        ([-0.02, -0.01, 0.0, -0.01], "coin by 1.00 ± 0.41 points"),
        ([0.02, 0.01, 0.03], None),
    ],
)
def test_worse_is_what_is_clear_of_the_seeds_spread(differences: list[float], worse: str | None):
    # The seeds themselves differ by far more: they are compared one by one.
    baseline = [0.90, 0.70, 0.80, 0.60][: len(differences)]
    ndas = [nda + difference for nda, difference in zip(baseline, differences, strict=True)]
    found = one(said(rows_of("average", baseline) + rows_of("coin", ndas)), "plain averaging")
    assert found.kind == ("note" if worse is None else "worse")
    assert (worse or "no method does clearly worse") in found.text


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_or_two_seeds_cannot_tell(seeds: int):
    rows = [
        row
        for method, nda in (("none", 0.95), ("average", 0.9), ("distillation", 0.9), ("coin", 0.5))
        for row in rows_of(method, [nda] * seeds)
    ]
    found = said(rows)
    assert all(item.kind == "note" for item in found)
    assert not any("plain averaging" in item.text for item in found)
    assert "not clearly" not in one(found, "Largest mean").text
    assert one(found, "cannot tell").text.startswith(("One seed", "Two seeds")[seeds - 1])


def test_a_method_is_held_against_the_strongest_variant_of_a_baseline():
    rows = [
        *rows_of("average", [0.80] * 3),
        *rows_of("average", [0.90] * 3, batchnorm="recalibrate"),
        *rows_of("coin", [0.85] * 3),
    ]
    assert "coin by 5.00 ± 0.00 points" in one(said(rows), "Than plain averaging").text


def test_the_largest_mean_is_named_with_those_that_are_level():
    others = [row for i in range(4) for row in rows_of(f"ties-{i}", [0.92, 0.94, 0.90])]
    found = said(rows_of("coin", [0.93, 0.93, 0.93]) + rows_of("average", [0.80, 0.81, 0.80]) + others)
    text = "linear: coin, 93.00 ± 0.00 % (not clearly above ties-0, ties-1, ties-2 and 1 more)"
    assert text in one(found, "Largest mean by decoder").text


def test_survivors_alone_and_a_coded_model_that_adds_nothing():
    none = rows_of("none", [0.9] * 3, batchnorm="", code_row="")
    found = one(said(none + rows_of("coin", [0.95] * 3)), "survivors")
    assert (found.kind, "adds 5.00 ± 0.00 points." in found.text) == ("note", True)
    found = one(said(none + rows_of("coin", [0.85] * 3)), "survivors")
    assert found.kind == "worse"
    assert "adds -5.00 ± 0.00 points" in found.text
    found = one(said(none + rows_of("coin", [0.85, 0.9, 0.92])), "survivors")
    assert (found.kind, "within the seeds' spread" in found.text) == ("note", True)


def test_what_an_automatic_policy_took_is_said_and_seeds_stay_together():
    rows = rows_of("coin", [0.8, 0.9, 0.97]) + rows_of("regmean", [0.9] * 3)
    rows[1] = replace(rows[1], batchnorm="auto:recalibrate")
    found = said(rows)
    text = "took: average for coin in 2 seeds, recalibrate for coin in 1 seed, average for regmean in 3 seeds."
    assert one(found, "auto took").text.endswith(text)
    assert "(0 of 3 seeds above)" in one(found, "97.5 %").text


def test_cautions():
    assert any("One seed only" in item.text for item in said(rows_of("coin", [0.9])))
    assert not any("cannot tell" in item.text for item in said(rows_of("coin", [0.9, 0.9, 0.9])))
    broken = said(rows_of("coin", [0.9]) + rows_of("oracle", [0.95], batchnorm=""))
    assert one(broken, "do not trust").kind == "fails"
    sound = said(rows_of("coin", [0.9]) + rows_of("oracle", [1.0], batchnorm=""))
    assert not any("do not trust" in item.text for item in sound)
    assert "coin" in one(said(rows_of("coin", [float("nan")])), "not defined").text


def test_methods_are_held_against_baselines_with_decoders_without_options():
    rows = rows_of("average", [0.9] * 3) + rows_of("coin", [0.8] * 3)
    found = said(rows + [replace(row, decoder="feature_ridge-64") for row in rows])
    assert "with the linear decoder" in one(found, "Than plain averaging").text
    assert "feature_ridge-64" in one(found, "Largest mean by decoder").text
