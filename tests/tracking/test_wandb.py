"""What an evaluation logs to W&B, how W&B is set up, and ``coin dashboard``."""

import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import wandb
import wandb_workspaces.workspaces.interface as interface

from coin.cli import main
from coin.errors import CoinError, ConfigurationError
from coin.reporting.results import confusion_key
from coin.tracking import dashboard
from coin.tracking.dashboard import workspace
from coin.tracking.evaluation import log_evaluation
from coin.tracking.runs import RunLog
from coin.tracking.settings import check_connection, run_environment
from tests.reporting.conftest import measured


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


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


def test_the_start_of_a_run_warns_of_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path / "seed-0", "quickstart", "expert", "expert mnist", (), {})
    with log.open(tmp_path / "step"):
        pass
    assert "WARNING" not in capfd.readouterr().err


def test_an_evaluation_reads_back_whole(tmp_path: Path, read_wandb: Any):
    folder = tmp_path / "runs" / "quickstart" / "seed-0"
    rows, confusions = measured(0)
    compressed = [replace(row, method="coin-4bit", nda=0.9) for row in rows if row.method == "coin"]
    replicas = [replace(row, method="replica", decoder="replica", nda=0.99) for row in rows if row.method == "none"]
    rows += [row for row in compressed if row.batchnorm.startswith("auto")] + replicas[-2:]
    log = RunLog(folder, "quickstart", "evaluate", "evaluate seed 0", ("overview",), {"lr": 0.1})
    classes = {"mnist": [f"digit {i}" for i in range(10)], "letters": [str(i) for i in range(10)]}
    with log.open(tmp_path / "step") as loggers:
        log_evaluation(loggers[1].experiment, rows, confusions, classes)

    (run_folder,) = (folder / "wandb").glob("offline-run-*")
    records = read_wandb(run_folder)
    (started,) = of_type(records, "run")
    names = [started[name] for name in ("run_group", "job_type", "display_name")]
    assert names == ["quickstart", "evaluate", "evaluate seed 0"]
    assert (started["tags"], started["config"]["update"]["lr"]) == (["overview"], 0.1)
    assert len(of_type(records, "history")) == 1  # tables and pictures; numbers are the summary's

    summary = {name: value for each in of_type(records, "summary") for name, value in each.get("update", {}).items()}
    frame = pd.DataFrame([vars(row) for row in rows])
    means = frame.groupby(["method", "decoder"])["nda"].mean()
    logged = {name: value for name, value in summary.items() if name.startswith("nda/")}
    assert logged == pytest.approx({f"nda/{name}/{decoder}": nda for (name, decoder), nda in means.items()}, rel=1e-12)
    assert {"nda/coin-4bit/linear", "nda/none/ridge", "nda/replica/replica"} <= {*logged}
    coded = means.drop(["none", "oracle", "replica"])
    assert summary["nda_mean_best"] == pytest.approx(coded.max(), rel=1e-12)
    method, decoder = coded.idxmax()
    assert (summary["best_method"], summary["best_decoder"]) == (method, decoder)
    own = frame[(frame["method"] == method) & (frame["decoder"] == decoder)]
    assert summary["best_memory_mib"] == pytest.approx(own["memory_mib"].mean(), rel=1e-12)
    assert summary["best_resident_mib"] == pytest.approx(own["resident_mib"].mean(), rel=1e-12)

    def table(name: str) -> dict[str, Any]:
        (file,) = (run_folder / "files" / "media" / "table").glob(f"{name}_*.table.json")
        return json.loads(file.read_text(encoding="utf-8"))

    assert len(table("results")["data"]) == len(rows)
    assert table("results")["columns"] == list(frame)
    cells = table("confusion/mnist_table")["data"]
    row = next(r for r in rows if (r.method, r.decoder, r.task) == (method, decoder, "mnist"))
    counts = confusions[confusion_key(row)]
    assert cells == [[f"digit {i}", f"digit {k}", counts[i, k]] for i in range(10) for k in range(10)]
    assert list((run_folder / "files/media/images").glob("nda_against_memory_*"))


def test_the_user_s_project_and_tags_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Any):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_TAGS", "one, two")
    with RunLog(tmp_path, "g", "method", "n", ("two", "x" * 100), {}).open(tmp_path / "step"):
        pass
    (run_folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (started,) = of_type(read_wandb(run_folder), "run")
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


@pytest.mark.usefixtures("online")
def test_online_without_a_key_or_a_server_is_one_line_of_advice(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CoinError, match=r"no W&B API key; run `wandb login`[^\n]*$"):
        check_connection()
    with socket.socket() as taken:  # bound but not listening: the port refuses connections
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(CoinError, match=r"does not answer[^\n]*set WANDB_MODE=offline$"):
            check_connection()
    check_connection("offline")
    asked = []
    monkeypatch.setattr(wandb, "login", lambda **options: asked.append(options) or True)
    check_connection()
    assert asked == [{"prompt": False, "verify": True}]  # a key that the server refuses is found at once


LOGGED = [f"nda/{name}/{decoder}" for name in ("coin", "refit-4bit", "none") for decoder in ("linear", "ridge")]
LOGGED += ["nda/replica-3bit/replica", "nda_mean_best", "confusion/mnist_table", "confusion/letters_table", "_step"]


def built(**options: Any) -> dict[str, Any]:
    """Return what is sent to W&B."""
    spec = workspace("me", "coin", LOGGED, **options)._to_model().spec
    return spec.model_dump(by_alias=True, exclude_none=True)["section"]


def test_bars_are_all_methods_of_a_decoder_beside_memory_and_tables():
    sections = built()["panelBankConfig"]["sections"]
    found = {section["name"]: [panel["config"] for panel in section["panels"]] for section in sections}
    bars = found["NDA by method"]
    assert [bar["chartTitle"] for bar in bars] == ["NDA, linear", "NDA, ridge", "NDA, replica"]
    both = [[f"nda/{name}/{decoder}" for name in ("coin", "none", "refit-4bit")] for decoder in ("linear", "ridge")]
    assert [bar["metrics"] for bar in bars] == [*both, ["nda/replica-3bit/replica"]]
    assert all((bar["groupAgg"], bar["groupArea"]) == ("mean", "stddev") for bar in bars)

    assert [*found] == ["NDA by method", "NDA against memory", "Results"]
    assert [panel["mediaKeys"] for panel in found["NDA against memory"]] == [["nda_against_memory"]]
    assert "results" in str(found["Results"])


def test_runs_are_grouped_by_experiment_and_job_type_and_filtered_by_experiment():
    for group in (None, "quickstart"):
        (runs,) = built(group=group)["runSets"]
        assert [key["name"] for key in runs["grouping"]] == ["group", "jobType"]
        assert ("quickstart" in str(runs["filters"])) == (group is not None)
    with pytest.raises(ConfigurationError, match=r"found no run of an evaluation in 'me/coin', group 'g'[^\n]*$"):
        workspace("me", "coin", ["val/accuracy"], group="g")


@pytest.mark.usefixtures("online")
def test_what_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def refused(*arguments: str) -> str:
        assert main(["dashboard", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("coin: error: ")
        assert "\n" not in error
        return error

    assert "project" in refused()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "found WANDB_MODE=offline" in refused("me/coin")
    for mode in ("online", ""):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert "run `wandb login`" in refused("me/coin")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert "pip install '.[dashboard]'" in refused("me/coin")


def test_a_server_s_runs_become_a_workspace_with_an_address(monkeypatch: pytest.MonkeyPatch, capsys):
    asked: dict[str, Any] = {}
    sent = []

    class Api:
        default_entity = "me"

        def runs(self, path: str, **options: Any) -> list[SimpleNamespace]:
            asked.update(path=path, **options)
            return [SimpleNamespace(summary=dict.fromkeys(LOGGED, 0))]

    def upsert(view: Any) -> dict[str, Any]:
        sent.append(view)
        return {"upsertView": {"view": {"name": "nw-abc-v", "id": "1"}}}

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(dashboard, "check_connection", lambda *_, **__: None)
    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(interface.internal, "upsert_view2", upsert)
    monkeypatch.setattr(interface, "get_app_url", lambda _: "https://wandb.test")
    assert main(["dashboard", "coin", "--group=quickstart"]) == 0
    assert capsys.readouterr().out.strip() == "https://wandb.test/me/coin?nw=abc"
    assert (asked["path"], asked["filters"]) == ("me/coin", {"jobType": "evaluate", "group": "quickstart"})
    (view,) = sent
    assert (view.entity, view.project, view.display_name) == ("me", "coin", "quickstart")
