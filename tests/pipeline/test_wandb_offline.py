"""What an experiment leaves for W&B, read back from its files alone, offline."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import pytest

from coin.cli import main
from coin.errors import NumericalError
from coin.files.atomic import sha256_of
from coin.reporting import read_results
from coin.reporting.summary import variant_names

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


def summary_of(records: Records) -> dict[str, Any]:
    return {name: value for record in of_type(records, "summary") for name, value in record.get("update", {}).items()}


def named(runs: list[tuple[Path, Records]], name: str) -> Records:
    return next(records for _, records in runs if run_of(records)["display_name"] == f"tiny-seed-0-{name}")


JOBS = {
    "expert-digits": "expert",
    "expert-letters": "expert",
    "fisher-exact-own": "fisher",
    **dict.fromkeys(("average", "coin", "coin-recalibrate", "coin-keep", "distillation"), "method"),
    "evaluate": "evaluate",
}
"""One run a job that does work; the references have none."""


def test_one_group_and_names_that_say_what_runs_are(runs: list[tuple[Path, Records]]) -> None:
    assert {run_of(records)["run_group"] for _, records in runs} == {"tiny"}
    names = {run_of(records)["display_name"]: run_of(records)["job_type"] for _, records in runs}
    assert names == {f"tiny-seed-0-{name}": job_type for name, job_type in JOBS.items()}
    assert len(names) == len(runs)


def test_runs_are_tagged_and_configured_to_group_by(runs: list[tuple[Path, Records]]) -> None:
    for _, records in runs:
        assert "small_resnet" in run_of(records)["tags"]
        config = config_of(records)
        assert (config["seed"], config["num_experts"], config["samples_per_task"]) == (0, 2, 24)
        experiment = config["experiment"]
        assert experiment["calibration"]["fisher_kind"] == "exact"  # a default, filled in
        assert experiment["tasks"]["digits"]["max_train"] == 120
        assert experiment["code"] == [[0.4, 0.6]]
        assert not of_type(records, "exit")[-1].get("exit_code")
    assert "digits" in run_of(named(runs, "expert-digits"))["tags"]
    recalibrated = config_of(named(runs, "coin-recalibrate"))
    assert (recalibrated["method"], recalibrated["batchnorm"]) == ("coin", "recalibrate")
    assert config_of(named(runs, "coin-keep"))["variant"] == "coin (keep)"


def test_curves_are_plotted_against_epochs_and_numbers_are_the_summary_s(runs: list[tuple[Path, Records]]) -> None:
    for name, metrics in {"expert-letters": ("train/loss", "val/accuracy"), "distillation": ("train/loss",)}.items():
        records = named(runs, name)
        # By full names: of several patterns that fit, Lightning's * among them, W&B takes any.
        found = {metric.get("name"): metric.get("step_metric") for metric in of_type(records, "metric")}
        for metric in metrics:
            assert found[metric] == "epoch", (name, metric)
            assert {metric, "epoch"} <= history_of(records).keys()
    for name, job_type in JOBS.items():
        if job_type == "method" and name != "distillation":
            assert of_type(named(runs, name), "history") == []


def test_summaries_are_the_numbers_of_the_file(runs: list[tuple[Path, Records]], finished: Path) -> None:
    overview = summary_of(named(runs, "evaluate"))
    frame = read_results(finished / "seed-0")
    files = {"coin (recalibrate)": "coin-recalibrate", "coin (keep)": "coin-keep"}
    names = variant_names(frame)
    assert {"average", "coin", "coin (recalibrate)", "coin (keep)", "distillation", "none", "oracle"} == set(names)
    for row in frame.assign(name=names).itertuples():
        if row.method not in ("none", "oracle"):
            single = summary_of(named(runs, files.get(row.name, row.name)))
            assert single[f"nda/{row.decoder}/{row.task}"] == pytest.approx(row.nda, rel=1e-12)
            assert single[f"agreement/{row.decoder}/{row.task}"] == pytest.approx(row.agreement, rel=1e-12)
            assert single["merge_passes"] == row.merge_passes
    assert overview["nda/distillation/feature_ridge/mean"] == pytest.approx(
        frame[(frame.method == "distillation") & (frame.decoder == "feature_ridge")].nda.mean(), rel=1e-12
    )
    assert summary_of(named(runs, "fisher-exact-own"))["fisher/digits/passes"] > 0


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
    charts = {name for name in config_of(records) if name.startswith("_wandb.visualize.")}
    assert charts == {f"_wandb.visualize.confusion/{task}/{task}" for task in ("digits", "letters")}
    assert len(of_type(records, "history")) == 1


def test_artifacts_are_linked_in_the_folder_and_lead_from_job_to_job(
    runs: list[tuple[Path, Records]], finished: Path
) -> None:
    made: dict[str, tuple[str, str]] = {}
    aliases: dict[str, set[str]] = {}
    for _, records in runs:
        for artifact in of_type(records, "artifact"):
            for content in artifact["manifest"]["contents"]:
                assert Path(content["local_path"]).is_relative_to(finished / "seed-0/wandb")
            if artifact["name"].startswith("tiny-"):
                (content,) = artifact["manifest"]["contents"]
                digest = sha256_of(Path(content["local_path"]))
                assert json.loads(artifact["metadata"])["sha256"] == digest
                made[artifact["name"]] = (run_of(records)["display_name"].removeprefix("tiny-seed-0-"), digest)
                aliases[artifact["name"]] = set(artifact["aliases"])
    coded = {"average", "coin", "coin-recalibrate", "coin-keep", "distillation"}
    assert {f"tiny-coded-model-{name}" for name in coded} | {"tiny-expert-digits", "tiny-expert-letters"} < set(made)
    assert all(found >= {"latest", "seed-0"} for found in aliases.values())
    (best,) = [name for name, found in aliases.items() if "best" in found]
    top = summary_of(named(runs, "evaluate"))["best_method"]
    assert best == f"tiny-coded-model-{top.replace(' (', '-').rstrip(')')}"
    experts = {"expert-digits", "expert-letters"}
    wanted = {
        "fisher-exact-own": experts,
        "average": experts,
        "coin": experts | {"fisher-exact-own"},
        "distillation": experts,
        "evaluate": experts | coded,
    }
    for name, sources in wanted.items():
        inputs = config_of(named(runs, name))["inputs"]
        assert {made[artifact][0] for artifact in inputs} == sources
        assert all(made[artifact][1] == digest for artifact, digest in inputs.items())
    initial = sha256_of(finished / "base/initial-6.safetensors")
    assert config_of(named(runs, "expert-letters"))["inputs"] == {"tiny-initial-6": initial}
    assert "tiny-initial-10" in config_of(named(runs, "coin-keep"))["inputs"]


def test_the_base_logs_the_shared_initialisation(finished: Path, read_wandb: Callable[[Path], Records]) -> None:
    (folder,) = (finished / "base/wandb").glob("offline-run-*")
    records = read_wandb(folder)
    assert run_of(records)["display_name"] == "tiny-expert-base"
    artifacts = {artifact["name"]: artifact["type"] for artifact in of_type(records, "artifact")}
    assert artifacts == {"tiny-initial-6": "initialisation", "tiny-initial-10": "initialisation"}


def test_an_experiment_s_own_tags_and_runs_of_methods_that_were_made_before(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Callable[[Path], Records]
) -> None:
    shutil.copytree(finished, tmp_path / "tiny", ignore=shutil.ignore_patterns("wandb"))
    (tmp_path / "tiny/seed-0/results.csv").unlink()  # only the evaluation is run again
    (tmp_path / "tiny/seed-0/.steps/wandb-coin.json").unlink()  # as new numbers have it
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert main(["run", "-c", str(config), f"--output={tmp_path}", "--wandb.tags=[mine]"]) == 0
    found = [read_wandb(folder) for folder in (tmp_path / "tiny").rglob("offline-run-*")]
    methods = {name for name, job_type in JOBS.items() if job_type == "method"}
    assert {run_of(each)["display_name"] for each in found} == {f"tiny-seed-0-{n}" for n in ("evaluate", *methods)}
    for records in found:
        assert set(run_of(records)["tags"]) >= {"small_resnet", "mine"}
        assert any(name.startswith("nda/") for name in summary_of(records))


def test_an_agent_of_a_sweep_gets_the_evaluation_alone(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Callable[[Path], Records]
) -> None:
    shutil.copytree(finished, tmp_path / "tiny", ignore=shutil.ignore_patterns("wandb"))
    shutil.rmtree(tmp_path / "tiny/seed-0/coded")
    shutil.rmtree(tmp_path / "tiny/seed-0/.steps")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["run", "-c", str(config), f"--output={tmp_path}", "--methods=[Average]"]) == 0
    (folder,) = (tmp_path / "tiny").rglob("offline-run-*")
    records = read_wandb(folder)
    assert run_of(records)["job_type"] == "evaluate"
    assert summary_of(records)["best_method"] == "average"


def test_an_agent_of_a_sweep_gets_the_mean_over_seeds(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Callable[[Path], Records]
) -> None:
    shutil.copytree(finished, tmp_path / "tiny", ignore=shutil.ignore_patterns("wandb"))
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = ["run", "-c", str(config), f"--output={tmp_path}", "--methods=[Average]", "--decoders=[linear]"]
    assert main([*command, "--seeds=[0,1]"]) == 0
    (folder,) = (tmp_path / "tiny/wandb").glob("offline-run-*")
    assert "nda_mean_best" in summary_of(read_wandb(folder))


def test_a_job_that_fails_is_told_to_have_failed(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Callable[[Path], Records]
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise NumericalError("it diverged; give a smaller learning rate")

    monkeypatch.setattr("coin.pipeline.plan_experts.train_network", fail)
    assert main(["run", "-c", str(config), f"--output={tmp_path}"]) == 2
    (folder,) = (tmp_path / "tiny/base/wandb").glob("offline-run-*")
    assert read_wandb(folder)[-1]["exit"]["exit_code"] == 1


def test_a_method_s_run_is_whole_again_where_it_was_killed_before_the_evaluation(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Callable[[Path], Records]
) -> None:
    """Of what an open run holds, a kill leaves nothing."""
    shutil.copytree(finished, tmp_path / "tiny", ignore=shutil.ignore_patterns("wandb"))
    for name in ("results.csv", ".steps/wandb-distillation.json", ".steps/evaluate.json"):
        (tmp_path / "tiny/seed-0" / name).unlink()
    logs = tmp_path / "tiny/seed-0/logs"
    before = (logs / "distillation/wandb-run-done-method").rename(logs / "distillation/wandb-run-id-method")
    run_id = before.read_text()
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert main(["run", "-c", str(config), f"--output={tmp_path}"]) == 0
    found = [(path, read_wandb(path)) for path in (tmp_path / "tiny/seed-0/wandb").glob("offline-run-*")]
    records = named(found, "distillation")
    assert run_of(records)["run_id"] == run_id
    curve = pd.read_csv(logs / "distillation/logs/metrics.csv")["train/loss"].dropna()
    logged = [row["item"]["train/loss"] for row in of_type(records, "history") if "train/loss" in row["item"]]
    assert logged == pytest.approx(curve.tolist())
    assert {"tiny-expert-digits", "tiny-expert-letters"} <= config_of(records)["inputs"].keys()
    assert "tiny-coded-model-distillation" in {artifact["name"] for artifact in of_type(records, "artifact")}
    assert summary_of(records)["nda/linear/mean"] > 0


def test_a_coded_model_is_logged_before_the_evaluation_reads_it(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "tiny", ignore=shutil.ignore_patterns("wandb", "coded"))
    told: list[tuple[str, str]] = []
    jobs = "coin.pipeline.step"
    monkeypatch.setattr(f"{jobs}.log_artifact", lambda run, path, name, *_: told.append(("made", name)))
    monkeypatch.setattr(f"{jobs}.use_artifact", lambda run, path, name, *_: told.append(("read", name)))
    assert main(["run", "-c", str(config), f"--output={tmp_path}", "--methods=[Average]"]) == 0
    assert told.index(("made", "tiny-coded-model-average")) < told.index(("read", "tiny-coded-model-average"))


@pytest.mark.parametrize(
    ("name", "said"),
    [("plan.log_method", "the runs of the methods"), ("runner.start_run", "the start of the run")],
)
def test_runs_of_methods_that_failed_are_tried_again(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    shutil.copytree(finished, tmp_path / "tiny")
    record = tmp_path / "tiny/seed-0/.steps/wandb-coin.json"
    record.unlink()

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(f"coin.pipeline.{name}", fail)
        with pytest.warns(UserWarning, match=f"did not take {said}"):
            assert main(["run", "-c", str(config), f"--output={tmp_path}"]) == 0
    assert not record.exists()
    assert main(["run", "-c", str(config), f"--output={tmp_path}"]) == 0
    assert record.exists()
