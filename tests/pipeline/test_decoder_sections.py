"""Decoders with options in an experiment's YAML, through the command line."""

from pathlib import Path

import pytest
import yaml

from coin.cli import main
from coin.reporting import read_results

pytestmark = pytest.mark.slow

SECTIONS = """
decoders:
  - linear
  - {kind: ridge, fitted_on: own}
  - {kind: feature_ridge, survivors: false}
  - {kind: feature_ridge, fitted_on: own, survivors: false}
"""
NAMES = ["linear", "ridge-own", "feature_ridge-alone", "feature_ridge-own-alone"]


@pytest.fixture
def experts(finished: Path) -> dict[str, str]:
    """The finished experiment's experts."""
    folder = finished / "seed-0/experts"
    return {task: str(folder / task / "expert.safetensors") for task in ("digits", "letters")}


@pytest.fixture
def tiny(config: Path, tmp_path: Path, experts: dict[str, str]) -> Path:
    """The tiny experiment with trained experts, plain averaging alone, and these decoders."""
    options = yaml.safe_load(config.read_text())
    options |= {"methods": [{"class_path": "Average"}], "expert": {"checkpoints": experts}, "output": str(tmp_path)}
    options |= yaml.safe_load(SECTIONS)
    path = tmp_path / "options.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.mark.usefixtures("no_reports")
def test_an_experiment_is_measured_with_every_decoder_and_repeats_itself(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-c", str(tiny)]) == 0
    seed = tmp_path / "tiny/seed-0"
    frame = read_results(seed)
    found = frame[frame.method == "average"]
    assert list(dict.fromkeys(found.decoder)) == NAMES
    assert found.groupby("decoder").size().eq(2).all()
    printed = capsys.readouterr().out
    assert "own-alone" in printed
    assert "…" not in printed
    # The configuration that was left repeats the run, and finds all of it done.
    assert yaml.safe_load((seed / "config.yaml").read_text())["decoders"] == yaml.safe_load(SECTIONS)["decoders"]
    assert main(["run", "-c", str(seed / "config.yaml")]) == 0
    assert "evaluation: up to date" in capsys.readouterr().err
    # The same decoders in other words are the same; other options are not.
    other = yaml.safe_load(SECTIONS)["decoders"]
    other[0] = {"kind": "linear"}
    assert main(["run", "-c", str(tiny), f"--decoders={other}"]) == 0
    assert "evaluation: up to date" in capsys.readouterr().err
    assert main(["run", "-c", str(tiny), "--decoders=[{kind: feature_ridge, fitted_on: own}]"]) == 0
    assert "evaluation: every" in capsys.readouterr().err
    assert set(read_results(seed).query("method == 'average'").decoder) == {"feature_ridge-own"}


def test_the_evaluator_takes_the_same_sections(
    finished: Path, experts: dict[str, str], config: Path, tmp_path: Path
) -> None:
    tasks = yaml.safe_load(config.read_text())["tasks"]
    options = {
        "model": {
            "class_path": "DecodingEvaluator",
            "init_args": {
                "experts": experts,
                "coded": [str(finished / "seed-0/coded/average.safetensors")],
                "decoders": yaml.safe_load(SECTIONS)["decoders"],
            },
        },
        "data": {"class_path": "Tasks", "init_args": {"tasks": tasks, "samples_per_task": 24}},
        "output": str(tmp_path),
        "trainer": {"logger": False, "default_root_dir": str(tmp_path)},
    }
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump(options))
    assert main(["evaluate", "-c", str(path)]) == 0
    frame = read_results(tmp_path)
    assert list(dict.fromkeys(frame[frame.method == "average"].decoder)) == NAMES
