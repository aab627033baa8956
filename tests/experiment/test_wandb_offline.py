"""What an experiment leaves for W&B, read back from its files alone, offline."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from coin.reporting.comparison import variant_names
from lightning.pytorch.loggers import Logger

from coin.cli import main
from coin.errors import NumericalError
from coin.files.atomic import sha256_of
from coin.reporting import read_results

pytestmark = pytest.mark.slow

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def runs(finished: Path, read_wandb: Callable[[Path], Records]) -> list[tuple[Path, Records]]:
    """The offline runs of the seed."""
    return [(folder, read_wandb(folder)) for folder in sorted((finished / "seed-0/wandb").glob("offline-run-*"))]


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
    return {name: value for row in of_type(records, "history") for name, value in row["item"].items()}


def named(runs: list[tuple[Path, Records]], name: str) -> Records:
    return next(records for _, records in runs if run_of(records)["display_name"] == f"tiny-seed-0-{name}")


def test_one_group_and_names_that_say_what_runs_are(runs: list[tuple[Path, Records]], finished: Path) -> None:
    assert {run_of(records)["run_group"] for _, records in runs} == {"tiny"}
    names = {run_of(records)["display_name"]: run_of(records)["job_type"] for _, records in runs}
    methods = dict.fromkeys(variant_names(read_results(finished / "seed-0")), "evaluate")
    assert len(methods) == 7
    assert {"coin (recalibrate)", "coin (keep)", "distillation", "none", "oracle"} <= methods.keys()
    jobs = JOBS | {f"method-{name}": job_type for name, job_type in methods.items()}
    assert names == {f"tiny-seed-0-{name}": job_type for name, job_type in jobs.items()}
    assert len(names) == len(runs)


JOBS = {
    "expert-digits": "expert",
    "expert-letters": "expert",
    "fisher-exact-own": "fisher",
    **{f"merge-{name}": "merge" for name in ("average", "coin", "coin-recalibrate", "coin-keep")},
    "distillation": "distill",
    "evaluate": "evaluate",
}


def test_runs_are_tagged_and_configured_to_group_by(runs: list[tuple[Path, Records]]) -> None:
    for _, records in runs:
        assert "small_resnet" in run_of(records)["tags"]
        config = config_of(records)
        assert (config["seed"], config["num_experts"], config["samples_per_task"]) == (0, 2, 24)
        experiment = config["experiment"]
        assert experiment["calibration"]["fisher_kind"] == "exact"  # a default, filled in
        assert experiment["tasks"]["digits"]["max_train"] == 120
        assert experiment["code"] == [[0.4, 0.6]]
    assert "digits" in run_of(named(runs, "expert-digits"))["tags"]
    merge = named(runs, "merge-coin-recalibrate")
    assert (config_of(merge)["method"], config_of(merge)["batchnorm"]) == ("coin", "recalibrate")
    assert config_of(named(runs, "method-coin (keep)"))["variant"] == "coin (keep)"


def test_metrics_are_plotted_against_epochs_p_n_and_beta(runs: list[tuple[Path, Records]]) -> None:
    wanted = {
        "expert-letters": {"train/loss": "epoch", "val/accuracy": "epoch"},
        "distillation": {"train/loss": "epoch"},
        "evaluate": {
            "nda/coin (keep)/ridge/mean": "samples_per_task",
            "seconds/coin (keep)/linear/digits": "samples_per_task",
        },
        "method-coin (keep)": {"nda/linear/mean": "samples_per_task", "residual/linear/letters": "samples_per_task"},
    }
    for name, axes in wanted.items():
        records = named(runs, name)
        # By full names: of several patterns that fit, Lightning's * among them, W&B takes any.
        found = {metric.get("name"): metric.get("step_metric") for metric in of_type(records, "metric")}
        history = history_of(records)
        for metric, axis in axes.items():
            assert found[metric] == axis, (name, metric)
            assert {metric, axis} <= history.keys()
        if axis == "samples_per_task":
            assert found.keys() >= {"num_experts", "beta/digits", "beta/letters"}
            assert (history["num_experts"], history["beta/digits"], history["beta/letters"]) == (2, 0.4, 0.6)


def test_scalars_are_the_numbers_of_the_file(runs: list[tuple[Path, Records]], finished: Path) -> None:
    overview = history_of(named(runs, "evaluate"))
    frame = read_results(finished / "seed-0")
    for row in frame.assign(name=variant_names(frame)).itertuples():
        assert overview[f"nda/{row.name}/{row.decoder}/{row.task}"] == pytest.approx(row.nda, rel=1e-12)
        single = history_of(named(runs, f"method-{row.name}"))
        assert single[f"agreement/{row.decoder}/{row.task}"] == pytest.approx(row.agreement, rel=1e-12)
    assert overview["nda/distillation/feature_ridge/mean"] == pytest.approx(
        frame[(frame.method == "distillation") & (frame.decoder == "feature_ridge")].nda.mean(), rel=1e-12
    )


def test_tables_and_charts_lie_in_the_run_folder(runs: list[tuple[Path, Records]], finished: Path) -> None:
    folder, records = next(pair for pair in runs if run_of(pair[1])["display_name"] == "tiny-seed-0-evaluate")
    (table,) = (folder / "files/media/table").glob("results_*.table.json")
    document = json.loads(table.read_text(encoding="utf-8"))
    assert {"method", "decoder", "nda", "merge_seconds", "decoder_seconds"} <= set(document["columns"])
    assert len(document["data"]) == len(read_results(finished / "seed-0"))
    (examples,) = (folder / "files/media/table").glob("examples_*.table.json")
    document = json.loads(examples.read_text(encoding="utf-8"))
    assert {row[document["columns"].index("task")] for row in document["data"]} == {"digits", "letters"}
    (artifact,) = [found for found in of_type(records, "artifact") if found["name"].endswith("-examples")]
    pictures = [file["local_path"] for file in artifact["manifest"]["contents"] if file["path"].endswith(".png")]
    assert pictures
    assert all(Path(picture).stat().st_size > 0 for picture in pictures)
    charts = {name for name, value in config_of(records).items() if name.startswith("_wandb.visualize.")}
    for chart in ("charts/nda_linear", "charts/nda_against_seconds", "charts/nda_task_digits",
                  "confusion/coin (keep)/linear/letters/letters"):  # fmt: skip
        assert f"_wandb.visualize.{chart}" in charts


def test_artifacts_are_staged_in_the_folder_and_lead_from_job_to_job(
    runs: list[tuple[Path, Records]], finished: Path
) -> None:
    made: dict[str, tuple[str, str]] = {}
    for _, records in runs:
        for artifact in of_type(records, "artifact"):
            for content in artifact["manifest"]["contents"]:
                assert Path(content["local_path"]).is_relative_to(finished / "seed-0/wandb")
            if artifact["name"].startswith("tiny-"):
                (content,) = artifact["manifest"]["contents"]
                digest = sha256_of(Path(content["local_path"]))
                assert json.loads(artifact["metadata"])["sha256"] == digest
                made[artifact["name"]] = (run_of(records)["display_name"].removeprefix("tiny-seed-0-"), digest)
    experts = {"expert-digits", "expert-letters"}
    coded = {"merge-average", "merge-coin", "merge-coin-recalibrate", "merge-coin-keep", "distillation"}
    wanted = {
        "fisher-exact-own": experts,
        "merge-average": experts,
        "merge-coin": experts | {"fisher-exact-own"},
        "distillation": experts,
        "evaluate": experts | coded,
    }
    for name, sources in wanted.items():
        inputs = config_of(named(runs, name))["inputs"]
        assert {made[artifact][0] for artifact in inputs} == sources
        assert all(made[artifact][1] == digest for artifact, digest in inputs.items())
    initial = sha256_of(finished / "base/initial-6.safetensors")
    assert config_of(named(runs, "expert-letters"))["inputs"] == {"tiny-initial-6": initial}
    assert "tiny-initial-10" in config_of(named(runs, "merge-coin-keep"))["inputs"]


def test_the_base_logs_the_shared_initialisation(finished: Path, read_wandb: Callable[[Path], Records]) -> None:
    (folder,) = (finished / "base/wandb").glob("offline-run-*")
    records = read_wandb(folder)
    assert run_of(records)["display_name"] == "tiny-expert-base"
    artifacts = {artifact["name"]: artifact["type"] for artifact in of_type(records, "artifact")}
    assert artifacts == {"tiny-initial-6": "initialisation", "tiny-initial-10": "initialisation"}


def test_an_experiment_s_own_tags_and_no_runs_of_methods(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Callable[[Path], Records]
) -> None:
    shutil.copytree(finished, tmp_path / "tiny", ignore=shutil.ignore_patterns("wandb"))
    (tmp_path / "tiny/seed-0/results.csv").unlink()  # only the evaluation is run again
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    options = ["--wandb.method_runs=false", "--wandb.tags=[mine]"]
    assert main(["run", "-c", str(config), f"--output={tmp_path}", *options]) == 0
    (folder,) = (tmp_path / "tiny").rglob("offline-run-*")
    run = run_of(read_wandb(folder))
    assert run["display_name"] == "tiny-seed-0-evaluate"
    assert set(run["tags"]) == {"small_resnet", "mine"}


def test_a_job_that_fails_is_told_to_have_failed(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Callable[[Path], Records]
) -> None:
    def fail(*_: Any, loggers: list[Logger], **__: Any) -> NoReturn:
        assert [logger.experiment for logger in loggers]  # begins the run
        raise NumericalError("it diverged; give a smaller learning rate")

    monkeypatch.setattr("coin.experiment.experts.train_network", fail)
    assert main(["run", "-c", str(config), f"--output={tmp_path}"]) == 2
    (folder,) = (tmp_path / "tiny/base/wandb").glob("offline-run-*")
    assert read_wandb(folder)[-1]["exit"]["exit_code"] == 1


def test_runs_of_methods_that_failed_are_tried_again(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "tiny")
    record = tmp_path / "tiny/seed-0/.steps/wandb-methods.json"
    record.unlink()

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr("coin.experiment.coded_models.log_method_runs", fail)
        with pytest.warns(UserWarning, match="did not take the runs of the methods"):
            assert main(["run", "-c", str(config), f"--output={tmp_path}"]) == 0
    assert not record.exists()
    assert main(["run", "-c", str(config), f"--output={tmp_path}"]) == 0
    assert record.exists()
