"""``coin dashboard``: what its workspace shows, and its one line where there is no way online."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import wandb_workspaces.workspaces.interface as interface

from coin.cli import main
from coin.errors import ConfigurationError
from coin.tracking import dashboard
from coin.tracking.dashboard import workspace

LOGGED = [f"nda/{name}/{decoder}" for name in ("coin", "refit-4bit", "none") for decoder in ("linear", "ridge")]
LOGGED += ["nda/replica-3bit/replica", "nda_mean_best", "confusion/mnist_table", "confusion/letters_table", "_step"]


def built(**options: Any) -> dict[str, Any]:
    """Return what is sent to W&B."""
    spec = workspace("me", "coin", LOGGED, **options)._to_model().spec
    return spec.model_dump(by_alias=True, exclude_none=True)["section"]


def panels() -> dict[str, list[dict[str, Any]]]:
    sections = built()["panelBankConfig"]["sections"]
    return {section["name"]: [panel["config"] for panel in section["panels"]] for section in sections}


def test_bars_are_all_methods_of_a_decoder_with_their_spread_over_seeds():
    bars = panels()["NDA by method"]
    assert [bar["chartTitle"] for bar in bars] == ["NDA, linear", "NDA, ridge", "NDA, replica"]
    assert [bar["metrics"] for bar in bars] == [
        [f"nda/{name}/linear" for name in ("coin", "none", "refit-4bit")],
        [f"nda/{name}/ridge" for name in ("coin", "none", "refit-4bit")],
        ["nda/replica-3bit/replica"],
    ]
    assert all((bar["groupAgg"], bar["groupArea"]) == ("mean", "stddev") for bar in bars)


def test_memory_curves_confusions_and_tables_are_shown():
    found = panels()
    assert [*found] == ["NDA by method", "NDA against memory", "Training", "Confusion", "Tables"]
    assert [panel["mediaKeys"] for panel in found["NDA against memory"]] == [["nda_against_memory"]]
    assert [panel["metrics"] for panel in found["Training"]] == [["val/accuracy"], ["train/loss"]]
    assert [chart["panelDefId"] for chart in found["Confusion"]] == ["wandb/confusion_matrix/v1"] * 2
    for task in ("letters", "mnist"):
        assert f"confusion/{task}_table" in str(found["Confusion"])
    assert all(name in str(found["Tables"]) for name in ("results", "examples"))


def test_runs_are_grouped_by_experiment_and_job_type_and_filtered_by_experiment():
    for group in (None, "quickstart"):
        (runs,) = built(group=group)["runSets"]
        assert [key["name"] for key in runs["grouping"]] == ["group", "jobType"]
        assert ("quickstart" in str(runs["filters"])) == (group is not None)


def test_without_runs_of_evaluations_there_is_advice():
    with pytest.raises(ConfigurationError, match=r"found no run of an evaluation in 'me/coin', group 'g'") as caught:
        workspace("me", "coin", ["val/accuracy"], group="g")
    assert "\n" not in str(caught.value)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Take away keys and network."""
    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    yield
    wandb.teardown()


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def refused(*arguments: str) -> str:
        assert main(["dashboard", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("coin: error: ")
        assert "\n" not in error
        assert "wandb sync" not in error  # there is nothing to log offline
        return error

    assert "run `wandb login`" in refused("me/coin")
    assert "expected ENTITY/PROJECT" in refused("a/b/c")
    assert "expected ENTITY/PROJECT" in refused("/coin")
    assert "project" in refused()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "found WANDB_MODE=offline" in refused("me/coin")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert "run `wandb login`" in refused("me/coin")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert "pip install '.[dashboard]'" in refused("me/coin")


def test_a_server_s_runs_become_a_workspace_with_an_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
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
    assert asked["path"] == "me/coin"
    assert asked["filters"] == {"jobType": "evaluate", "group": "quickstart"}
    (view,) = sent
    assert (view.entity, view.project, view.display_name) == ("me", "coin", "quickstart")
