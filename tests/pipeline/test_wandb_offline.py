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


@pytest.fixture(scope="module")
def runs(finished: Path, read_wandb: Callable[[Path], Records]) -> list[tuple[Path, Records]]:
    """The offline runs of the seed."""
    return [
        (folder, read_wandb(folder))
        for folder in sorted((finished / "seed-0/wandb").glob("offline-run-*"))
    ]


def run_of(records: Records) -> dict[str, Any]:
    return next(record["run"] for record in records if record["type"] == "run")


def of_type(records: Records, kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def config_of(records: Records) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for update in (run_of(records)["config"], *of_type(records, "config")):
        config |= update.get("update", {})
    return config


def history_of(records: Records) -> dict[str, Any]:
    """Return the last value of everything that was logged."""
    return {
        name: value for row in of_type(records, "history") for name, value in row["item"].items()
    }


def summary_of(records: Records) -> dict[str, Any]:
    return {
        name: value
        for record in of_type(records, "summary")
        for name, value in record.get("update", {}).items()
    }


def named(runs: list[tuple[Path, Records]], name: str) -> Records:
    return next(
        records for _, records in runs if run_of(records)["display_name"] == f"tiny-seed-0-{name}"
    )


JOBS = {
    "expert-digits": "expert",
    "expert-letters": "expert",
    "distillation": "method",
    "evaluate": "evaluate",
}
"""One run a training, and one for the evaluation."""


def test_one_group_and_names_that_say_what_runs_are(
    runs: list[tuple[Path, Records]], finished: Path, read_wandb: Callable[[Path], Records]
) -> None:
    assert {run_of(records)["run_group"] for _, records in runs} == {"tiny"}
    names = {run_of(records)["display_name"]: run_of(records)["job_type"] for _, records in runs}
    assert names == {f"tiny-seed-0-{name}": job_type for name, job_type in JOBS.items()}
    assert len(names) == len(runs)
    (folder,) = (finished / "base/wandb").glob("offline-run-*")
    assert run_of(read_wandb(folder))["display_name"] == "tiny-base"


def test_runs_are_tagged_and_configured_to_group_by(runs: list[tuple[Path, Records]]) -> None:
    for _, records in runs:
        assert "small_resnet" in run_of(records)["tags"]
        config = config_of(records)
        assert (config["seed"], config["num_experts"], config["samples_per_task"]) == (0, 2, 24)
        experiment = config["experiment"]
        assert experiment["calibration"]["fisher_kind"] == "exact"  # a default, filled in
        assert experiment["tasks"]["digits"]["init_args"]["max_train"] == 120
        assert experiment["code"] == [[0.4, 0.6]]
        assert not of_type(records, "exit")[-1].get("exit_code")
    assert "digits" in run_of(named(runs, "expert-digits"))["tags"]
    assert config_of(named(runs, "distillation"))["method"] == "distillation"


def test_curves_are_plotted_against_epochs(runs: list[tuple[Path, Records]]) -> None:
    for name, metrics in {
        "expert-letters": ("train/loss", "val/accuracy"),
        "distillation": ("train/loss",),
    }.items():
        records = named(runs, name)
        # By full names: of several patterns that fit, Lightning's * among them, W&B takes any.
        found = {
            metric.get("name"): metric.get("step_metric") for metric in of_type(records, "metric")
        }
        for metric in metrics:
            assert found[metric] == "epoch", (name, metric)
            assert {metric, "epoch"} <= history_of(records).keys()


def test_the_summary_has_the_numbers_of_the_file(
    runs: list[tuple[Path, Records]], finished: Path
) -> None:
    overview = summary_of(named(runs, "evaluate"))
    frame = read_results(finished / "seed-0")
    names = {"average", "coin", "coin-recalibrate", "coin-keep", "distillation", "none", "oracle"}
    assert names == set(frame["method"])
    for (name, decoder), rows in frame.groupby(["method", "decoder"]):
        assert overview[f"nda/{name}/{decoder}"] == pytest.approx(rows.nda.mean(), rel=1e-12)


def test_tables_and_charts_lie_in_the_run_folder(
    runs: list[tuple[Path, Records]], finished: Path
) -> None:
    folder, records = next(
        pair for pair in runs if run_of(pair[1])["display_name"] == "tiny-seed-0-evaluate"
    )
    (table,) = (folder / "files/media/table").glob("results_*.table.json")
    document = json.loads(table.read_text(encoding="utf-8"))
    assert {"method", "decoder", "nda", "merge_seconds", "decoder_seconds"} <= set(
        document["columns"]
    )
    assert len(document["data"]) == len(read_results(finished / "seed-0"))
    staged = []
    for artifact in of_type(records, "artifact"):
        staged += [Path(file["local_path"]) for file in artifact["manifest"]["contents"]]
    assert staged
    assert all(path.is_relative_to(finished / "seed-0/wandb") for path in staged)
    charts = {name for name in config_of(records) if name.startswith("_wandb.visualize.")}
    assert charts == {f"_wandb.visualize.confusion/{task}" for task in ("digits", "letters")}


def test_a_training_that_fails_is_told_to_have_failed_and_its_run_goes_on(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_wandb: Callable[[Path], Records],
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise NumericalError("it diverged; give a smaller learning rate")

    with monkeypatch.context() as patch:
        patch.setattr("coin.callbacks.export.ExpertExport.on_train_end", fail)
        assert main(["run", "-c", str(config), f"--output={tmp_path}", "--only=base"]) == 2
    (folder,) = (tmp_path / "tiny/base/wandb").glob("offline-run-*")
    assert read_wandb(folder)[-1]["exit"]["exit_code"] == 1
    assert main(["run", "-c", str(config), f"--output={tmp_path}", "--only=base"]) == 0
    folders = (tmp_path / "tiny/base/wandb").glob("offline-run-*")
    assert len({run_of(read_wandb(each))["run_id"] for each in folders}) == 1


def test_a_run_that_w_and_b_does_not_take_is_a_warning(
    copied: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise ConnectionError("gone")

    monkeypatch.setattr("coin.tracking.runs.RunLog._logger", fail)
    with pytest.warns(UserWarning, match="did not take the start of the run"):
        assert (
            main(["run", "-c", str(config), f"--output={copied.parent}", "--decoders=[linear]"])
            == 0
        )
