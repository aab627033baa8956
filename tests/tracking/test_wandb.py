"""What an evaluation logs to W&B, how W&B is set up, and ``coin dashboard``."""

import json
import os
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
import wandb_workspaces.workspaces.interface as interface

from coin.cli import main
from coin.errors import CoinError, CoinWarning, ConfigurationError
from coin.reporting.results import confusion_key
from coin.tracking.dashboard import workspace
from coin.tracking.evaluation import log_evaluation
from coin.tracking.runs import RunLog
from coin.tracking.settings import check_connection, run_environment
from tests.reporting.conftest import row


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path, "group", "method", "name", ("two", "x" * 100), {"lr": 0.1})


@pytest.fixture
def logged(tmp_path, read_wandb):
    """Return a function that returns the records of every offline run, by their types."""

    def read():
        runs = []
        for folder in tmp_path.glob("wandb/offline-run-*"):
            found = {}
            for record in read_wandb(folder):
                kind = record["type"]
                found.setdefault(kind, []).append(record[kind])
            runs.append(found)
        return runs

    return read


def test_a_run_has_the_user_s_project_and_tags(log, logged, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_TAGS", "one, two")
    with log.open(tmp_path / "step"):
        pass
    assert "WARNING" not in capfd.readouterr().err
    (records,) = logged()
    (started,) = records["run"]
    assert started["project"] == "theirs"
    assert started["run_group"] == "group"
    assert started["job_type"] == "method"
    assert started["display_name"] == "name"
    assert set(started["tags"]) == {"one", "two", "x" * 64}
    assert started["config"]["update"]["lr"] == 0.1


def test_what_failed_goes_on_in_its_run(log, logged, tmp_path):
    with pytest.raises(KeyError), log.open(tmp_path / "step"):
        raise KeyError
    with log.open(tmp_path / "step"):
        pass
    ids = set()
    codes = set()
    for records in logged():
        ids |= {started["run_id"] for started in records["run"]}
        codes |= {ended.get("exit_code", 0) for ended in records["exit"]}
    assert len(ids) == 1
    assert codes == {0, 1}


def test_a_run_that_w_and_b_does_not_take_is_a_warning(log, tmp_path, monkeypatch):
    def fail(**_):
        raise ConnectionError("gone")

    monkeypatch.setattr("coin.tracking.runs.WandbLogger", fail)
    with (
        pytest.warns(CoinWarning, match="did not take the start of the run"),
        log.open(tmp_path / "step") as loggers,
    ):
        assert len(loggers) == 1  # of files


def rows_of(task, worse):
    """Return the rows of a task, lost alone and with the other one."""
    return [
        row(0.8 - worse, task),
        row(0.9 - worse, task, method="coin-4bit", memory_mib=4.0, resident_mib=5.0),
        row(0.5 - worse, task, method="none", decoder="ridge"),
        row(0.95, task, method="replica", decoder="replica"),
        row(1.0, task, method="oracle"),
        row(5.0, task, erased="a+b"),
    ]


NDAS = {
    "nda/coin/linear": 0.7,
    "nda/coin-4bit/linear": 0.8,
    "nda/none/ridge": 0.4,
    "nda/replica/replica": 0.95,
    "nda/oracle/linear": 1.0,
}
"""Means over tasks, each lost alone."""
BEST = {
    "nda_mean_best": 0.8,
    "best_memory_mib": 4.0,
    "best_resident_mib": 5.0,
}


def test_an_evaluation_reads_back_whole(log, logged, tmp_path):
    rows = [*rows_of("a", 0.0), *rows_of("b", 0.2)]
    draw = np.random.default_rng(0)
    confusions = {confusion_key(each): draw.integers(0, 9, (10, 10)) for each in rows}
    digits = [f"digit {number}" for number in range(10)]
    with log.open(tmp_path / "step") as loggers:
        run = loggers[1].experiment
        log_evaluation(run, rows, confusions, {"a": digits, "b": digits})

    (records,) = logged()
    assert len(records["history"]) == 1  # tables and pictures; numbers are the summary's
    summary = {}
    for record in records["summary"]:
        summary |= record.get("update", {})
    ndas = {name: nda for name, nda in summary.items() if name.startswith("nda/")}
    assert ndas == pytest.approx(NDAS, rel=1e-12)
    assert (summary["best_method"], summary["best_decoder"]) == ("coin-4bit", "linear")
    assert {name: summary[name] for name in BEST} == pytest.approx(BEST, rel=1e-12)

    (media,) = tmp_path.glob("wandb/offline-run-*/files/media")

    def table(name):
        (file,) = media.glob(f"table/{name}_*.table.json")
        return json.loads(file.read_text(encoding="utf-8"))

    assert table("results")["columns"] == list(vars(rows[0]))
    assert len(table("results")["data"]) == len(rows)
    counts = confusions[confusion_key(rows[1])]  # the best method's
    cells = [[digits[i], digits[k], counts[i, k]] for i in range(10) for k in range(10)]
    assert table("confusion/a_table")["data"] == cells
    assert list(media.glob("images/nda_against_memory_*"))


def test_the_environment_is_offline_unless_the_user_says_and_put_back(tmp_path, monkeypatch):
    folder = tmp_path / "seed-0"
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    with run_environment(folder):
        assert os.environ["WANDB_MODE"] == "offline"
        assert os.environ["WANDB_DIR"] == str(folder)
        assert os.environ["WANDB_DATA_DIR"] == str(folder / "wandb")
    assert os.environ["WANDB_DIR"] == "/elsewhere"
    assert "WANDB_MODE" not in os.environ
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with run_environment(folder):
        assert os.environ["WANDB_MODE"] == "disabled"


@pytest.mark.usefixtures("online")
def test_online_without_a_server_is_one_line_of_advice(monkeypatch):
    check_connection("offline")
    with socket.socket() as taken:  # bound but not listening: the port refuses connections
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(CoinError, match=r"does not answer[^\n]*set WANDB_MODE=offline$"):
            check_connection()


LOGGED = ["nda_mean_best", "confusion/a_table", "_step", "nda/replica-3bit/replica"]
LOGGED += ["nda/none/linear", "nda/coin/linear", "nda/refit-4bit/ridge"]


def test_a_workspace_has_bars_of_all_methods_of_a_decoder_beside_memory_and_tables():
    spec = workspace("me", "coin", LOGGED, group="quickstart")._to_model().spec
    section = spec.model_dump(by_alias=True, exclude_none=True)["section"]  # sent to W&B
    panels = {}
    for each in section["panelBankConfig"]["sections"]:
        panels[each["name"]] = [panel["config"] for panel in each["panels"]]
    bars = panels["NDA by method"]
    assert {bar["chartTitle"]: bar["metrics"] for bar in bars} == {
        "NDA, linear": ["nda/coin/linear", "nda/none/linear"],
        "NDA, ridge": ["nda/refit-4bit/ridge"],
        "NDA, replica": ["nda/replica-3bit/replica"],
    }
    assert {(bar["groupAgg"], bar["groupArea"]) for bar in bars} == {("mean", "stddev")}
    assert panels["NDA against memory"][0]["mediaKeys"] == ["nda_against_memory"]
    assert "results" in str(panels["Results"])
    (runs,) = section["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["group", "jobType"]
    assert "quickstart" in str(runs["filters"])


def test_without_an_evaluation_there_is_no_workspace():
    message = "found no run of an evaluation in 'me/coin', group 'g'"
    with pytest.raises(ConfigurationError, match=message):
        workspace("me", "coin", ["val/accuracy"], group="g")


MISTAKES = {
    "found WANDB_MODE=offline": ("offline", []),
    "run `wandb login`": ("online", []),
    "pip install '.[dashboard]'": ("online", ["wandb_workspaces.workspaces"]),
}


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("expected", MISTAKES)
def test_a_dashboard_that_cannot_be_is_one_line(expected, monkeypatch, capsys):
    mode, missing = MISTAKES[expected]
    monkeypatch.setenv("WANDB_MODE", mode)
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["dashboard", "me/coin"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_a_server_s_runs_become_a_workspace_with_an_address(monkeypatch, capsys):
    asked = []
    sent = []

    class Api:
        default_entity = "me"

        def runs(self, path, filters, order):
            asked.append((path, filters))
            return [SimpleNamespace(summary=dict.fromkeys(LOGGED, 0))]

    def upsert(view):
        sent.append((view.entity, view.project, view.display_name))
        return {"upsertView": {"view": {"name": "nw-abc-v", "id": "1"}}}

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(interface.internal, "upsert_view2", upsert)
    monkeypatch.setattr(interface, "get_app_url", lambda _: "https://wandb.test")
    assert main(["dashboard", "coin", "--group=quickstart"]) == 0
    assert capsys.readouterr().out.strip() == "https://wandb.test/me/coin?nw=abc"
    assert asked == [("me/coin", {"jobType": "evaluate", "group": "quickstart"})]
    assert sent == [("me", "coin", "quickstart")]
