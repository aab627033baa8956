"""Decoders with options in an experiment's YAML, through the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from coin.cli import main
from coin.reporting import read_results

pytestmark = pytest.mark.slow

SECTIONS: list[Any] = [
    "linear",
    {"kind": "ridge", "survivors": True},
    {"kind": "feature_ridge", "survivors": False},
]
NAMES = ["linear", "ridge", "feature_ridge-alone"]


@pytest.mark.usefixtures("no_reports")
def test_an_experiment_is_measured_with_every_decoder_and_repeats_itself(
    run_small: Callable[..., Path], trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    seed = run_small(**trained, methods=[{"class_path": "Average"}], decoders=SECTIONS)
    found = read_results(seed).query("method == 'average'")
    assert list(dict.fromkeys(found.decoder)) == NAMES
    assert found.groupby("decoder").size().eq(2).all()
    assert "…" not in capsys.readouterr().out
    # The configuration that was left repeats the run, and finds all of it done.
    assert yaml.safe_load((seed / "config.yaml").read_text())["decoders"] == SECTIONS
    assert main(["run", "-c", str(seed / "config.yaml")]) == 0
    assert "evaluation: up to date" in capsys.readouterr().err
    # The same decoders in other words are the same.
    assert main(["run", "-c", str(seed / "config.yaml"), f"--decoders={[{'kind': 'linear'}, *SECTIONS[1:]]}"]) == 0
    assert "evaluation: up to date" in capsys.readouterr().err
