"""What an experiment leaves for W&B, read back from its files alone, offline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from coin.cli import main
from coin.errors import NumericalError
from coin.reporting import read_results

pytestmark = pytest.mark.slow

Records = list[dict[str, Any]]


def of_type(records: Records, kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def updates(records: Records, kind: str) -> dict[str, Any]:
    """Return what all records of a type set."""
    found: dict[str, Any] = {}
    for record in of_type(records, kind):
        found |= record.get("update", {})
    return found


@pytest.fixture(scope="module")
def runs(finished: Path, read_wandb: Callable[[Path], Records]) -> dict[str, Records]:
    """The records of the offline runs of the experiment, by the names of the runs."""
    found = {}
    for folder in finished.glob("*/wandb/offline-run-*"):
        records = read_wandb(folder)
        (started,) = of_type(records, "run")
        found[started["display_name"]] = [*records, {"type": "folder", "folder": folder}]
    return found


JOBS = {
    "tiny-base": "expert",
    "tiny-seed-0-expert-digits": "expert",
    "tiny-seed-0-expert-letters": "expert",
    "tiny-seed-0-distillation": "method",
    "tiny-seed-0-evaluate": "evaluate",
}
"""One run a training, and one for the evaluation."""


def test_runs_have_names_tags_and_a_configuration_to_group_by(runs: dict[str, Records]) -> None:
    assert runs.keys() == JOBS.keys()
    for name, job in JOBS.items():
        (started,) = of_type(runs[name], "run")
        assert (started["run_group"], started["job_type"]) == ("tiny", job)
        assert "small_resnet" in started["tags"]
        config = started["config"]["update"]
        assert config["seed"] == (None if name == "tiny-base" else 0)
        assert (config["num_experts"], config["samples_per_task"]) == (2, 24)
        experiment = config["experiment"]
        assert experiment["calibration"]["fisher_kind"] == "exact"  # a default, filled in
        assert experiment["code"] == [[0.4, 0.6]]
    (started,) = of_type(runs["tiny-seed-0-distillation"], "run")
    assert started["config"]["update"]["method"] == "distillation"


CURVES = {
    "tiny-seed-0-expert-letters": {"train/loss", "val/accuracy"},
    "tiny-seed-0-distillation": {"train/loss"},
}


@pytest.mark.parametrize("name", CURVES)
def test_curves_are_plotted_against_epochs(name: str, runs: dict[str, Records]) -> None:
    # By full names: of several patterns that fit, Lightning's * among them, W&B takes any.
    axes = {axis.get("name"): axis.get("step_metric") for axis in of_type(runs[name], "metric")}
    assert {axes[metric] for metric in CURVES[name]} == {"epoch"}
    logged = [row["item"].keys() for row in of_type(runs[name], "history")]
    assert set().union(*logged) >= {*CURVES[name], "epoch"}


def test_the_evaluation_has_the_numbers_and_the_table_of_the_file(
    runs: dict[str, Records], finished: Path
) -> None:
    records = runs["tiny-seed-0-evaluate"]
    frame = read_results(finished / "seed-0")
    summary = updates(records, "summary")
    for (name, decoder), rows in frame.groupby(["method", "decoder"]):
        assert summary[f"nda/{name}/{decoder}"] == pytest.approx(rows["nda"].mean(), rel=1e-12)
    (folder,) = of_type(records, "folder")
    (table,) = folder.glob("files/media/table/results_*.table.json")
    assert len(json.loads(table.read_text(encoding="utf-8"))["data"]) == len(frame)
    charts = [name for name in updates(records, "config") if "visualize.confusion" in name]
    assert len(charts) == 2
    for artifact in of_type(
        records, "artifact"
    ):  # staged where `wandb sync` of the folder finds them
        for file in artifact["manifest"]["contents"]:
            assert Path(file["local_path"]).is_relative_to(finished / "seed-0/wandb")


def test_a_training_that_failed_goes_on_in_its_run(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_wandb: Callable[[Path], Records],
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise NumericalError("it diverged; give a smaller learning rate")

    command = ["run", "-c", str(config), f"--output={tmp_path}", "--only=base"]
    with monkeypatch.context() as patch:
        patch.setattr("coin.callbacks.export.ExpertExport.on_train_end", fail)
        assert main(command) == 2
    (folder,) = tmp_path.glob("tiny/base/wandb/offline-run-*")
    assert read_wandb(folder)[-1]["exit"]["exit_code"] == 1
    assert main(command) == 0
    ids = set()
    for folder in tmp_path.glob("tiny/base/wandb/offline-run-*"):
        ids |= {started["run_id"] for started in of_type(read_wandb(folder), "run")}
    assert len(ids) == 1


def test_a_run_that_w_and_b_does_not_take_is_a_warning(
    copied: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise ConnectionError("gone")

    monkeypatch.setattr("coin.tracking.runs.WandbLogger", fail)
    with pytest.warns(UserWarning, match="did not take the start of the run"):
        assert (
            main(["run", "-c", str(config), f"--output={copied.parent}", "--decoders=[linear]"])
            == 0
        )
