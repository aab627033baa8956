import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb

from coin.errors import CoinError, ConfigurationError
from coin.reporting.extras import Examples
from coin.reporting.results import Row, confusion_key
from coin.reporting.summary import variant_names
from coin.tracking.evaluation import log_evaluation
from coin.tracking.runs import start_run
from coin.tracking.settings import check_connection, run_environment

Measured = Callable[..., tuple[list[Row], dict[str, Any]]]
Read = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    return


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


def summary_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for record in of_type(records, "summary") for name, value in record.get("update", {}).items()}


def test_an_evaluation_reads_back_whole(tmp_path: Path, measure: Measured, read_wandb: Read):
    folder = tmp_path / "runs" / "quickstart" / "seed-0"
    rows, confusions = measure(0)
    compressed = [replace(row, method="coin-4bit", nda=0.9) for row in rows if row.method == "coin"]
    replicas = [replace(row, method="replica", decoder="replica", nda=0.99) for row in rows if row.method == "none"]
    rows += [row for row in compressed if row.batchnorm.startswith("auto")] + replicas[-2:]
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    answers = np.array([0, 1])
    examples = Examples(images, answers, answers, {"coin||feature_ridge": answers[::-1]}, ("cat", "dog"))
    named = {"group": "quickstart", "job_type": "evaluate", "name": "evaluate seed 0"}
    run = start_run(folder, **named, config={"lr": 0.1}, tags=["overview"])
    log_evaluation(run, rows, confusions, examples, {"mnist": [f"digit {i}" for i in range(10)]})
    run.finish()

    (run_folder,) = run_folders(folder)
    records = read_wandb(run_folder)
    (started,) = of_type(records, "run")
    assert [started[name] for name in ("run_group", "job_type", "display_name")] == [*named.values()]
    assert (started["tags"], started["config"]["update"]["lr"]) == (["overview"], 0.1)
    assert len(of_type(records, "history")) == 1  # tables and pictures; numbers are the summary's

    summary = summary_of(records)
    frame = pd.DataFrame([vars(row) for row in rows])
    means = frame.assign(name=variant_names(frame)).groupby(["name", "decoder"])["nda"].mean()
    logged = {name: value for name, value in summary.items() if name.startswith("nda/")}
    assert logged == pytest.approx({f"nda/{name}/{decoder}": nda for (name, decoder), nda in means.items()}, rel=1e-12)
    assert {"nda/coin-4bit/linear", "nda/none/ridge", "nda/replica/replica"} <= {*logged}
    coded = means.drop(["none", "oracle", "replica"])
    assert summary["nda_mean_best"] == pytest.approx(coded.max(), rel=1e-12)
    method, decoder = coded.idxmax()
    assert (summary["best_method"], summary["best_decoder"]) == (method, decoder)

    def table(name: str) -> dict[str, Any]:
        (file,) = (run_folder / "files" / "media" / "table").glob(f"{name}_*.table.json")
        return json.loads(file.read_text(encoding="utf-8"))

    assert len(table("results")["data"]) == len(rows)
    assert table("results")["columns"] == list(frame)
    assert table("examples")["columns"] == ["image", "task", "label", "expert", "coin"]
    answered = [row[1:] for row in table("examples")["data"]]
    assert answered == [["", "cat", "cat", "dog"], ["", "dog", "dog", "cat"]]
    cells = table("confusion/mnist_table")["data"]
    row = next(r for r in rows if (r.method, r.decoder, r.task) == (method, decoder, "mnist"))
    counts = confusions[confusion_key(row)]
    assert {(i, k): n for i, k, n in cells} == {
        (f"digit {i}", f"digit {k}"): counts[i, k] for i, k in zip(*counts.nonzero(), strict=True)
    }
    assert list((run_folder / "files/media/images").glob("nda_against_memory_*"))


def test_the_user_s_project_and_tags_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Read):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_TAGS", "one, two")
    start_run(tmp_path, group="g", job_type="method", name="n", tags=["two", "x" * 100]).finish()
    (started,) = of_type(read_wandb(run_folders(tmp_path)[0]), "run")
    assert started["project"] == "theirs"
    assert set(started["tags"]) == {"one", "two", "x" * 64}


def test_the_environment_is_offline_unless_the_user_says_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    with run_environment(tmp_path / "seed-0"):
        assert (os.environ["WANDB_MODE"], os.environ["WANDB_DIR"]) == ("offline", str(tmp_path / "seed-0"))
        assert Path(os.environ["WANDB_DATA_DIR"]).is_relative_to(tmp_path / "seed-0")
    assert os.environ["WANDB_DIR"] == "/elsewhere"
    assert not {"WANDB_MODE", "WANDB_DATA_DIR"} & set(os.environ)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with run_environment(tmp_path):
        assert os.environ["WANDB_MODE"] == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(ConfigurationError, match="expected one of"), run_environment(tmp_path):
        pass


@pytest.mark.usefixtures("online")
def test_online_without_a_key_or_a_server_is_one_line_of_advice(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CoinError, match=r"no W&B API key; run `wandb login`[^\n]*$"):
        check_connection()
    with socket.socket() as taken:  # bound but not listening: the port refuses connections
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(CoinError, match=r"does not answer[^\n]*`wandb sync` later[^\n]*$"):
            check_connection()


@pytest.mark.usefixtures("online")
def test_a_login_passes(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(wandb, "login", lambda **options: asked.append(options) or True)
    check_connection()
    assert asked == [{"prompt": False, "verify": True}]  # a key that the server refuses is found at once
    check_connection("offline")
    assert len(asked) == 1
