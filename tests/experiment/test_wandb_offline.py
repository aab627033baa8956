"""What an experiment leaves for W&B, read back from its files alone, offline."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from coin.reporting import read_results

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def runs(finished: Path) -> list[tuple[Path, Records]]:
    """The offline runs of the seed, read with W&B's own reader."""
    found = []
    for folder in sorted((finished / "seed-0/wandb").glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        found.append((folder, [json.loads(line) for line in done.stdout.splitlines()]))
    return found


def run_of(records: Records) -> dict[str, Any]:
    return next(record["run"] for record in records if record["type"] == "run")


def summary_of(records: Records) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for record in records:
        if record["type"] == "summary":
            summary |= record["summary"].get("update", {})
        elif record["type"] == "history":
            summary |= record["history"].get("item", {}) if "item" in record["history"] else record["history"]
    return summary


def evaluation(runs: list[tuple[Path, Records]]) -> tuple[Path, Records]:
    return next((folder, records) for folder, records in runs if run_of(records)["job_type"] == "evaluate")


def test_one_group_and_a_job_type_a_step(runs: list[tuple[Path, Records]]) -> None:
    assert {run_of(records)["run_group"] for _, records in runs} == {"tiny"}
    jobs = Counter(run_of(records)["job_type"] for _, records in runs)
    assert jobs == {"expert": 2, "fisher": 1, "merge": 4, "distill": 1, "evaluate": 1}


def test_scalars_are_the_numbers_of_the_file(runs: list[tuple[Path, Records]], finished: Path) -> None:
    text = json.dumps(summary_of(evaluation(runs)[1]))
    frame = read_results(finished / "seed-0").set_index(["method", "batchnorm", "decoder", "task"])
    for method in ("average", "distillation"):
        for decoder in ("linear", "ridge", "feature_ridge"):
            assert f"nda/{method}/{decoder}/digits" in text
            assert f"nda/{method}/{decoder}/mean" in text
    assert str(round(float(frame.nda["average", "average", "linear", "digits"]), 6))[:6] in text


def test_table_and_artifacts_are_inside_the_run_folder(runs: list[tuple[Path, Records]], finished: Path) -> None:
    folder, _ = evaluation(runs)
    tables = list((folder / "files/media/table").rglob("*.json"))
    assert tables
    columns = [json.loads(path.read_text())["columns"] for path in tables]
    assert any({"method", "decoder", "nda", "calibration_seconds"} <= set(names) for names in columns)
    staged = [path for path in (finished / "seed-0/wandb").rglob("*") if "artifacts" in path.parts and path.is_file()]
    wanted = [path for path in (finished / "seed-0").rglob("*.safetensors") if "wandb" not in path.parts]
    sizes = {path.stat().st_size for path in staged}
    assert wanted
    assert {path.stat().st_size for path in wanted} <= sizes


def test_artifact_records_name_experts_statistics_and_coded_models(runs: list[tuple[Path, Records]]) -> None:
    text = json.dumps([records for _, records in runs])
    for name in ("tiny-seed-0-expert-digits", "tiny-seed-0-statistics-letters", "tiny-seed-0-coded-model-coin"):
        assert name in text
