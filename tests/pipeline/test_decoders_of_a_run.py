"""The decoders of an experiment's YAML, through the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from coin.cli import main
from coin.reporting import read_results

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("no_reports")
def test_an_experiment_is_measured_with_every_decoder_and_repeats_itself(
    run_small: Callable[..., Path], trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["linear", "ridge", "expert_head"]
    seed = run_small(**trained, methods=[{"class_path": "Average"}], decoders=kinds)
    found = read_results(seed).query("method == 'average'")
    assert list(dict.fromkeys(found.decoder)) == kinds
    assert found.groupby("decoder").size().eq(2).all()
    assert "…" not in capsys.readouterr().out
    # The configuration that was left repeats the run, and finds all of it done.
    assert yaml.safe_load((seed / "config.yaml").read_text())["decoders"] == kinds
    assert main(["run", "-c", str(seed / "config.yaml")]) == 0
    assert "evaluation: up to date" in capsys.readouterr().err
