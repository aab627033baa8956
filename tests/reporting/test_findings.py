from dataclasses import replace

import pandas as pd

from coin.reporting import Finding, Row, findings

BASE = Row("x", 0, "coin", "average", "linear", "0", "a", "a", 200, 0.9, 0.8, 0.9, 0.85, 0.5, 4.0, 8400.0)


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


def test_the_paper_s_accuracy_is_held_against_the_numbers():
    short = one(said(rows_of("coin", [0.97, 0.974, 0.98])), "97.5 %")
    assert short.kind == "fails"
    assert "1 of 3 seeds reach it" in short.text
    assert "97.47 ± 0.50 %" in short.text
    assert one(said(rows_of("coin", [0.976, 0.98, 0.99])), "97.5 %").kind == "holds"


def test_the_paper_s_cost_is_held_against_the_numbers():
    coin = rows_of("coin", [0.9, 0.9])
    dear = rows_of("distillation", [0.95, 0.95], calibration_seconds=30.0, sample_passes=57600.0)
    found = one(said(coin + dear), "cheaper")
    assert found.kind == "holds"
    assert "4.0 s against 30.0 s, 8,400 against 57,600" in found.text
    cheap = rows_of("distillation", [0.95, 0.95], calibration_seconds=3.0)
    assert one(said(coin + cheap), "cheaper").kind == "fails"


def test_claims_that_were_not_measured_are_not_judged():
    found = said(rows_of("average", [0.9]))
    assert "not tested" in one(found, "COIN was not measured").text
    assert all(item.kind != "holds" for item in found)
    assert "not tested" in one(said(rows_of("coin", [0.9])), "Distillation was not measured").text


def test_a_method_below_plain_averaging_is_named_with_its_seeds():
    found = said(rows_of("average", [0.90, 0.92, 0.91]) + rows_of("coin", [0.88, 0.93, 0.90]))
    worse = one(found, "Than plain averaging")
    assert worse.kind == "worse"
    # Differences by seed: -2, +1, -1 points.
    assert "coin by 0.67 (in 2 of 3 seeds) points" in worse.text
    better = said(rows_of("average", [0.90, 0.92]) + rows_of("coin", [0.95, 0.93]))
    assert one(better, "no method does worse than plain averaging").kind == "note"


def test_a_method_is_held_against_the_strongest_variant_of_a_baseline():
    rows = rows_of("average", [0.80]) + rows_of("average", [0.90], batchnorm="recalibrate") + rows_of("coin", [0.85])
    assert "coin by 5.00 points" in one(said(rows), "Than plain averaging").text


def test_survivors_alone_and_a_coded_model_that_adds_nothing():
    none = rows_of("none", [0.9], batchnorm="", code_row="")
    assert one(said(none + rows_of("coin", [0.95])), "survivors").kind == "note"
    found = one(said(none + rows_of("coin", [0.85])), "survivors")
    assert found.kind == "worse"
    assert "adds -5.00 points" in found.text


def test_cautions():
    assert any("One seed only" in item.text for item in said(rows_of("coin", [0.9])))
    assert not any("One seed only" in item.text for item in said(rows_of("coin", [0.9, 0.9])))
    broken = said(rows_of("coin", [0.9]) + rows_of("oracle", [0.95], batchnorm=""))
    assert one(broken, "do not trust").kind == "fails"
    sound = said(rows_of("coin", [0.9]) + rows_of("oracle", [1.0], batchnorm=""))
    assert not any("do not trust" in item.text for item in sound)
    assert "coin" in one(said(rows_of("coin", [float("nan")])), "not defined").text


def test_methods_are_held_against_baselines_with_decoders_without_options():
    rows = rows_of("average", [0.9, 0.9]) + rows_of("coin", [0.8, 0.8])
    found = said(rows + [replace(row, decoder="feature_ridge-64") for row in rows])
    assert "with the linear decoder" in one(found, "Than plain averaging").text
    assert "feature_ridge-64" in one(found, "Best method by decoder").text
