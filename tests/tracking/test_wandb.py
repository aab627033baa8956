"""What an evaluation logs to W&B, how W&B is set up, and ``coin dashboard``."""

import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb
import wandb_workspaces.workspaces.interface as interface

from coin.cli import main
from coin.errors import CoinError, ConfigurationError
from coin.reporting.results import confusion_key
from coin.tracking.dashboard import workspace
from coin.tracking.evaluation import log_evaluation
from coin.tracking.runs import RunLog
from coin.tracking.settings import check_connection, run_environment
from tests.reporting.conftest import measured


def of_type(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def offline_run(folder: Path) -> Path:
    """Return the folder of the one offline run."""
    (found,) = (folder / "wandb").glob("offline-run-*")
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_has_the_user_s_project_and_tags_and_how_it_ended(
    fails: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_wandb: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_TAGS", "one, two")
    log = RunLog(tmp_path, "group", "method", "name", ("two", "x" * 100), {"lr": 0.1})
    try:
        with log.open(tmp_path / "step"):
            assert not fails
    except AssertionError:
        pass
    assert "WARNING" not in capfd.readouterr().err
    records = read_wandb(offline_run(tmp_path))
    (started,) = of_type(records, "run")
    named = [started[name] for name in ("project", "run_group", "job_type", "display_name")]
    assert named == ["theirs", "group", "method", "name"]
    assert set(started["tags"]) == {"one", "two", "x" * 64}
    assert started["config"]["update"]["lr"] == 0.1
    assert records[-1]["exit"].get("exit_code", 0) == fails


@pytest.fixture
def evaluation() -> tuple[list[Any], dict[str, Any]]:
    """Rows and confusions of two tasks, lost alone and together, with compressed models and copies."""
    rows = measured(0)
    for row in list(rows):
        if row.method == "coin":
            rows.append(replace(row, method="coin-4bit", nda=0.9))
            rows.append(replace(row, method="both-lost", erased="a+b", nda=5.0))
        if row.method == "none":
            rows.append(replace(row, method="replica", decoder="replica", nda=0.99))
    draw = np.random.default_rng(0)
    confusions = {confusion_key(row): draw.integers(0, 9, (10, 10)) for row in rows}
    return rows, confusions


def test_an_evaluation_reads_back_whole(evaluation: Any, tmp_path: Path, read_wandb: Any) -> None:
    rows, confusions = evaluation
    digits = [f"digit {number}" for number in range(10)]
    log = RunLog(tmp_path, "quickstart", "evaluate", "evaluate seed 0", ("overview",), {})
    with log.open(tmp_path / "step") as loggers:
        classes = {"a": digits, "b": digits}
        log_evaluation(loggers[1].experiment, rows, confusions, classes)

    records = read_wandb(offline_run(tmp_path))
    assert len(of_type(records, "history")) == 1  # tables and pictures; numbers are the summary's
    summary: dict[str, Any] = {}
    for record in of_type(records, "summary"):
        summary |= record.get("update", {})
    frame = pd.DataFrame([vars(row) for row in rows])
    alone = frame[frame["erased"] == frame["task"]]
    means = alone.groupby(["method", "decoder"])["nda"].mean()
    for (name, decoder), nda in means.items():
        assert summary.pop(f"nda/{name}/{decoder}") == pytest.approx(nda, rel=1e-12)
    assert not [name for name in summary if name.startswith("nda/")]
    coded = means.drop(["none", "oracle", "replica"])
    method, decoder = coded.idxmax()
    assert summary["nda_mean_best"] == pytest.approx(coded.max(), rel=1e-12)
    assert (summary["best_method"], summary["best_decoder"]) == (method, decoder)
    best = alone[(alone["method"] == method) & (alone["decoder"] == decoder)]
    for name in ("memory_mib", "resident_mib"):
        assert summary[f"best_{name}"] == pytest.approx(best[name].mean(), rel=1e-12)

    def table(name: str) -> dict[str, Any]:
        media = offline_run(tmp_path) / "files/media"
        (file,) = media.glob(f"table/{name}_*.table.json")
        return json.loads(file.read_text(encoding="utf-8"))

    assert table("results")["columns"] == list(frame)
    assert len(table("results")["data"]) == len(rows)
    (place,) = best.index[best["task"] == "a"]
    counts = confusions[confusion_key(rows[place])]
    cells = table("confusion/a_table")["data"]
    expected = [[digits[i], digits[k], counts[i, k]] for i in range(10) for k in range(10)]
    assert cells == expected
    assert list(offline_run(tmp_path).glob("files/media/images/nda_against_memory_*"))


def test_the_environment_is_offline_unless_the_user_says_and_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_online_without_a_key_or_a_server_is_one_line_of_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(CoinError, match=r"no W&B API key; run `wandb login`[^\n]*$"):
        check_connection()
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


def built(**options: Any) -> dict[str, Any]:
    """Return what is sent to W&B."""
    spec = workspace("me", "coin", LOGGED, **options)._to_model().spec
    return spec.model_dump(by_alias=True, exclude_none=True)["section"]


def test_bars_are_all_methods_of_a_decoder_beside_memory_and_tables() -> None:
    sections = {}
    for section in built()["panelBankConfig"]["sections"]:
        sections[section["name"]] = [panel["config"] for panel in section["panels"]]
    bars = sections["NDA by method"]
    assert {bar["chartTitle"]: bar["metrics"] for bar in bars} == {
        "NDA, linear": ["nda/coin/linear", "nda/none/linear"],
        "NDA, ridge": ["nda/refit-4bit/ridge"],
        "NDA, replica": ["nda/replica-3bit/replica"],
    }
    assert {(bar["groupAgg"], bar["groupArea"]) for bar in bars} == {("mean", "stddev")}
    assert sections["NDA against memory"][0]["mediaKeys"] == ["nda_against_memory"]
    assert "results" in str(sections["Results"])


@pytest.mark.parametrize("group", [None, "quickstart"])
def test_runs_are_grouped_by_experiment_and_job_type(group: str | None) -> None:
    (runs,) = built(group=group)["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["group", "jobType"]
    assert ("quickstart" in str(runs["filters"])) == (group is not None)


def test_without_an_evaluation_there_is_no_workspace() -> None:
    message = "found no run of an evaluation in 'me/coin', group 'g'"
    with pytest.raises(ConfigurationError, match=message):
        workspace("me", "coin", ["val/accuracy"], group="g")


MISTAKES = {
    "offline": ("offline", "found WANDB_MODE=offline"),
    "no key": ("online", "run `wandb login`"),
    "not installed": ("online", "pip install '.[dashboard]'"),
}


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("case", MISTAKES)
def test_a_dashboard_that_cannot_be_is_one_line(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mode, expected = MISTAKES[case]
    monkeypatch.setenv("WANDB_MODE", mode)
    if case == "not installed":
        monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["dashboard", "me/coin"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_a_server_s_runs_become_a_workspace_with_an_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(interface.internal, "upsert_view2", upsert)
    monkeypatch.setattr(interface, "get_app_url", lambda _: "https://wandb.test")
    assert main(["dashboard", "coin", "--group=quickstart"]) == 0
    assert capsys.readouterr().out.strip() == "https://wandb.test/me/coin?nw=abc"
    assert (asked["path"], asked["filters"]) == (
        "me/coin",
        {"jobType": "evaluate", "group": "quickstart"},
    )
    (view,) = sent
    assert (view.entity, view.project, view.display_name) == ("me", "coin", "quickstart")
