import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from coin.errors import CoinError, ConfigurationError, FileError
from coin.reporting import Examples, summarise
from coin.reporting.results import Row
from coin.reporting.wandb_connection import check_connection
from coin.reporting.wandb_evaluation import log_evaluation, log_examples, log_method_runs, log_summary
from coin.reporting.wandb_logging import JOB_TYPES, finish_run, log_artifact, start_run, training_loggers, use_artifact
from coin.reporting.wandb_settings import run_environment

Measured = Callable[..., tuple[list[Row], dict[str, Any]]]
Read = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    yield
    finish_run()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ask for online mode; W&B reads its environment once per process, so make it forget before and after."""
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield
    wandb.teardown()


def of_type(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def run_folders(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def test_an_evaluation_reads_back_whole(tmp_path: Path, measure: Measured, read_wandb: Read):
    folder = tmp_path / "runs" / "quickstart" / "seed-0"
    rows, confusions = measure(0)
    run = start_run(
        folder, group="quickstart", job_type="evaluate", name="evaluate seed 0", config={"lr": 0.1}, tags=["overview"]
    )
    log_evaluation(run, rows, confusions)
    weights = folder / "expert.safetensors"
    weights.write_bytes(b"weights")
    log_artifact(run, weights, "quickstart mnist/expert", "expert", {"task": "mnist"})
    use_artifact(run, weights, "quickstart mnist/expert", "expert")
    finish_run()

    (run_folder,) = run_folders(folder)
    records = read_wandb(run_folder)
    (started,) = of_type(records, "run")
    assert (started["run_group"], started["job_type"], started["display_name"]) == (
        "quickstart", "evaluate", "evaluate seed 0",
    )  # fmt: skip
    assert started["tags"] == ["overview"]
    assert started["config"]["update"]["lr"] == 0.1

    history: dict[str, Any] = {}
    for record in of_type(records, "history"):
        history.update(record["item"])
    for row in rows:
        if row.method == "coin" and row.batchnorm == "recalibrate":
            key = f"coin (recalibrate)/{row.decoder}/{row.task}"
            assert history[f"nda/{key}"] == pytest.approx(row.nda, rel=1e-12)
            assert history[f"seconds/{key}"] == pytest.approx(row.merge_seconds + row.decoder_seconds)
            assert history[f"decoder_passes/{key}"] == row.decoder_passes
    mean = np.mean([row.nda for row in rows if (row.method, row.decoder) == ("distillation", "ridge")])
    assert history["nda/distillation/ridge/mean"] == pytest.approx(mean, rel=1e-12)
    assert "residual/none/ridge/mean" not in history  # not defined, so not logged

    axes = {record.get("name"): record.get("step_metric") for record in of_type(records, "metric")}
    assert {axes[name] for name in history if name.startswith(("nda/", "residual/"))} == {"samples_per_task"}

    contenders = [row for row in rows if row.method not in ("none", "oracle")]
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in contenders:
        groups.setdefault((row.method, row.batchnorm, row.decoder), []).append(row.nda)
    summary: dict[str, Any] = {}
    for record in of_type(records, "summary"):
        summary.update(record.get("update", {}))
    assert summary["nda_mean_best"] == pytest.approx(max(np.mean(ndas) for ndas in groups.values()), rel=1e-12)

    tables = list((run_folder / "files" / "media" / "table").rglob("results_*.table.json"))
    table = json.loads(tables[0].read_text(encoding="utf-8"))
    assert len(table["data"]) == len(rows)
    assert table["columns"][0] == "experiment"

    artifacts = {record["name"]: record for record in of_type(records, "artifact")}
    expert = artifacts["quickstart-mnist-expert"]
    assert expert["type"] == "expert"
    (content,) = expert["manifest"]["contents"]
    staged = Path(content["local_path"])
    assert staged.is_relative_to(folder)
    assert staged.read_bytes() == b"weights"
    metadata = json.loads(expert["metadata"])
    assert metadata["task"] == "mnist"
    configured: dict[str, Any] = {}
    for record in of_type(records, "config"):
        configured.update(record.get("update", {}))
    assert metadata["sha256"] in json.dumps(configured)  # the offline stand-in for lineage
    everything = [
        Path(content["local_path"])
        for artifact in artifacts.values()
        for content in artifact["manifest"]["contents"]
        if "local_path" in content
    ]
    assert all(path.is_relative_to(folder) for path in everything)


def test_runs_per_method_group_by_their_configuration(tmp_path: Path, measure: Measured, read_wandb: Read):
    rows = [row for row in measure(2)[0] if row.method in ("none", "coin")]
    log_method_runs(tmp_path, pd.DataFrame([vars(row) for row in rows]), group="g", config={"lr": 0.1})
    found = {}
    for folder in run_folders(tmp_path):
        records = read_wandb(folder)
        config = of_type(records, "run")[0]["config"]["update"]
        item = {key: value for record in of_type(records, "history") for key, value in record["item"].items()}
        found[config["variant"]] = (config, item)
    assert set(found) == {"none", "coin", "coin (recalibrate)"}
    config, item = found["coin (recalibrate)"]
    assert (config["method"], config["batchnorm"], config["seed"], config["lr"]) == ("coin", "recalibrate", 2, 0.1)
    wanted = np.mean([row.nda for row in rows if (row.batchnorm, row.decoder) == ("recalibrate", "linear")])
    assert item["nda/linear/mean"] == pytest.approx(wanted, rel=1e-12)


def test_all_seeds_together_are_one_run_with_their_spread(tmp_path: Path, measure: Measured, read_wandb: Read):
    frame = pd.DataFrame([vars(row) for seed in (0, 1) for row in measure(seed)[0]])
    log_summary(tmp_path, summarise(frame), group="g", config={"lr": 0.1}, tags=["mine"])
    (folder,) = run_folders(tmp_path)
    records = read_wandb(folder)
    (started,) = of_type(records, "run")
    assert (started["display_name"], started["job_type"]) == ("g-summary", "evaluate")
    assert set(started["tags"]) == {"summary", "mine"}
    (file,) = (folder / "files/media/table").glob("summary_*")
    table = json.loads(file.read_text(encoding="utf-8"))
    spread = table["columns"].index("nda_std")
    assert all(row[spread] is not None for row in table["data"])
    assert list((folder / "files/media/images/figures").glob("nda_by_method_*"))


def test_a_sweep_s_agent_gets_the_evaluation_alone(tmp_path: Path, measure: Measured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    with run_environment(tmp_path):
        assert os.environ["WANDB_MODE"] == "online"  # an offline agent would wait for its run for ever
    monkeypatch.setenv("WANDB_MODE", "offline")
    kinds = {kind: [type(logger) for logger in training_loggers(tmp_path, "g", kind, "n")] for kind in JOB_TYPES}
    assert kinds.pop("evaluate") == [CSVLogger, WandbLogger]
    assert all(found == [CSVLogger] for found in kinds.values())
    frame = pd.DataFrame([vars(row) for row in measure(0)[0]])
    log_method_runs(tmp_path, frame, group="g", config={})
    log_summary(tmp_path, summarise(frame), group="g", config={})
    assert run_folders(tmp_path) == []


def test_the_user_s_project_and_tags_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Read):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_TAGS", "one, two")
    start_run(tmp_path, group="g", job_type="merge", name="n", tags=["two", "x" * 100])
    finish_run()
    (started,) = of_type(read_wandb(run_folders(tmp_path)[0]), "run")
    assert started["project"] == "theirs"
    assert set(started["tags"]) == {"one", "two", "x" * 64}


def test_one_history_row_per_number_of_samples(tmp_path: Path, measure: Measured, read_wandb: Read):
    rows = [row for samples in (1000, 50, 200) for row in measure(0, samples=samples)[0]]
    log_evaluation(start_run(tmp_path, group="g", job_type="evaluate", name="n"), rows)
    finish_run()
    history = of_type(read_wandb(run_folders(tmp_path)[0]), "history")
    axis = [record["item"]["samples_per_task"] for record in history if "samples_per_task" in record["item"]]
    assert axis == [50, 200, 1000]


def test_examples_are_a_table_of_images(tmp_path: Path):
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    answers = np.array([0, 1])
    run = start_run(tmp_path, group="g", job_type="evaluate", name="n")
    log_examples(run, Examples(images, answers, answers, {"coin||ridge": answers[::-1]}, ("cat", "dog")))
    finish_run()
    (file,) = (run_folders(tmp_path)[0] / "files" / "media" / "table").glob("examples_*")
    data = json.loads(file.read_text(encoding="utf-8"))["data"]
    assert [row[1:] for row in data] == [["", "cat", "dog", "cat", True], ["", "dog", "cat", "dog", True]]


def test_the_environment_is_offline_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    with run_environment(tmp_path / "seed-0"):
        assert os.environ["WANDB_MODE"] == "offline"
        assert os.environ["WANDB_DIR"] == str(tmp_path / "seed-0")
        assert Path(os.environ["WANDB_DATA_DIR"]).is_relative_to(tmp_path / "seed-0")
    assert os.environ["WANDB_DIR"] == "/elsewhere"
    assert "WANDB_MODE" not in os.environ
    assert "WANDB_DATA_DIR" not in os.environ


def test_the_user_s_mode_is_kept_and_nonsense_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with run_environment(tmp_path):
        assert os.environ["WANDB_MODE"] == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(ConfigurationError, match="expected one of"), run_environment(tmp_path):
        pass


@pytest.mark.usefixtures("online")
def test_online_without_a_key_is_one_line_of_advice(tmp_path: Path):
    with pytest.raises(CoinError, match="wandb login") as caught:
        start_run(tmp_path / "run", group="g", job_type="evaluate", name="n")
    assert "\n" not in str(caught.value)
    assert wandb.run is None


@pytest.mark.usefixtures("online")
def test_online_without_a_server_is_one_line_of_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:  # bound but not listening: the port refuses connections
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(CoinError, match="does not answer") as caught:
            training_loggers(tmp_path, "g", "expert", "n")
    assert "wandb sync" in str(caught.value)


@pytest.mark.usefixtures("online")
def test_a_server_that_answers_and_a_key_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password secret\n", encoding="utf-8")
    netrc.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("NETRC", str(netrc))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        check_connection()
        monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
        with pytest.raises(CoinError, match="no W&B API key"):
            check_connection()


@pytest.mark.usefixtures("online")
def test_a_key_under_w_and_b_s_older_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n", encoding="utf-8")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: socket.socket())
    check_connection()


@pytest.mark.usefixtures("online")
def test_a_name_server_that_hangs_does_not_hang_us(monkeypatch: pytest.MonkeyPatch):
    from coin.reporting import wandb_connection

    monkeypatch.setattr(wandb_connection, "_CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(wandb_connection, "_JOIN_SECONDS", 0.1)
    released = threading.Event()

    def hang(*_: Any, **__: Any) -> None:
        released.wait(30)
        raise OSError("released")

    monkeypatch.setattr(socket, "create_connection", hang)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    try:
        with pytest.raises(CoinError, match="no answer in"):
            check_connection()
    finally:
        released.set()


def test_training_loggers_csv_first_and_a_new_run_each(tmp_path: Path, read_wandb: Read):
    for name in ("first", "second"):
        loggers = training_loggers(tmp_path / name, "g", "expert", name)
        assert [type(logger) for logger in loggers] == [CSVLogger, WandbLogger]
        for logger in loggers:
            logger.log_metrics({"loss": 0.5}, step=1)
            logger.save()
        assert (tmp_path / name / "logs" / "metrics.csv").is_file()
    finish_run()
    for name in ("first", "second"):
        records = read_wandb(run_folders(tmp_path / name)[0])
        (started,) = of_type(records, "run")
        assert (started["run_group"], started["job_type"], started["display_name"]) == ("g", "expert", name)
        assert any(record["item"].get("loss") == 0.5 for record in of_type(records, "history"))


def test_unknown_job_type_and_missing_artifact(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="job type"):
        start_run(tmp_path, group="g", job_type="training", name="n")
    run = start_run(tmp_path, group="g", job_type="merge", name="n")
    with pytest.raises(FileError, match="make it first"):
        log_artifact(run, tmp_path / "nothing", "a", "expert")
    with pytest.raises(FileError, match="make it first"):
        use_artifact(run, tmp_path / "nothing", "a", "expert")
