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

DECODERS = ("linear", "ridge")
LOGGED = [
    *(f"nda/{decoder}/{leaf}" for decoder in DECODERS for leaf in ("mean", "mnist", "letters")),
    *(f"{unit}/{decoder}" for unit in ("seconds", "passes") for decoder in ("linear", "ridge")),
    "nda/linear/mnist+letters/mnist",
    "residual",
    "_step",
]


def built(**options: Any) -> dict[str, Any]:
    """Return what is sent to W&B."""
    spec = workspace("me", "coin", LOGGED, **options)._to_model().spec
    return spec.model_dump(by_alias=True, exclude_none=True)["section"]


def panels() -> dict[str, list[dict[str, Any]]]:
    sections = built()["panelBankConfig"]["sections"]
    return {section["name"]: [panel["config"] for panel in section["panels"]] for section in sections}


def test_bars_are_methods_with_their_spread():
    found = panels()
    bars = found["NDA by method"]
    assert [bar["metrics"] for bar in bars] == [["nda/linear/mean"], ["nda/ridge/mean"]]
    by_task = [bar["metrics"][0] for bar in found["NDA by task"]]
    assert by_task == ["nda/linear/letters", "nda/ridge/letters", "nda/linear/mnist", "nda/ridge/mnist"]
    for panel in [*bars, *found["NDA by task"]]:
        assert (panel["groupBy"], panel["groupAgg"], panel["groupArea"]) == ("variant.value", "mean", "stddev")


def test_points_are_nda_against_cost_samples_and_residual():
    found = panels()
    axes = {name: {(point["xAxis"], point["yAxis"]) for point in found[name]} for name in found if "against" in name}
    assert ("summary:seconds/ridge", "summary:nda/ridge/mean") in axes["NDA against cost"]
    assert ("summary:passes/linear", "summary:nda/linear/mean") in axes["NDA against cost"]
    assert {x for x, _ in axes["NDA against P and N"]} == {"config:samples_per_task.value", "config:num_experts.value"}
    assert ("summary:residual", "summary:nda/linear/mean") in axes["NDA against the residual"]


def test_memory_stands_first_then_methods_curves_figures_and_confusions():
    found = panels()
    assert [*found][:5] == [
        "NDA against memory", "NDA by method", "Training", "Memory, cost and risk of each seed", "Confusion",
    ]  # fmt: skip
    assert {point["xAxis"] for point in found["NDA against memory"]} == {f"summary:memory_mib/{d}" for d in DECODERS}
    assert [panel["metrics"] for panel in found["Training"]] == [["val/accuracy"], ["train/loss"]]
    assert [panel["mediaKeys"] for panel in found["Memory, cost and risk of each seed"]] == [
        ["figures/nda_against_memory"], ["figures/nda_against_cost"], ["figures/risk"],
    ]  # fmt: skip
    assert [chart["panelDefId"] for chart in found["Confusion"]] == ["wandb/confusion_matrix/v1"] * 2
    assert all(f"confusion/{task}/{task}_table" in str(found["Confusion"]) for task in ("letters", "mnist"))
    assert all(name in str(found["Tables"]) for name in ("summary", "results", "risk", "examples"))


def test_runs_are_grouped_by_experiment_job_type_and_method_and_filtered_by_experiment():
    (runs,) = built()["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["group", "jobType", "variant.value"]
    assert "quickstart" not in str(runs["filters"])
    (runs,) = built(group="quickstart")["runSets"]
    assert "quickstart" in str(runs["filters"])


def test_without_runs_of_methods_there_is_advice():
    with pytest.raises(ConfigurationError, match=r"found no run of a method in 'me/coin', group 'g'") as caught:
        workspace("me", "coin", ["nda/coin/linear/mean"], group="g")
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
@pytest.mark.parametrize(
    ("arguments", "mode", "said"),
    [
        (["me/coin"], "offline", "found WANDB_MODE=offline"),
        (["me/coin"], None, "run `wandb login`"),
        (["me/coin"], "online", "run `wandb login`"),
        (["a/b/c"], None, "expected ENTITY/PROJECT"),
        (["/coin"], None, "expected ENTITY/PROJECT"),
        ([], None, "project"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str],
    mode: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    assert main(["dashboard", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("coin: error: ")
    assert len(error.splitlines()) == 1
    assert said in error
    assert "wandb sync" not in error  # there is nothing to log offline


@pytest.mark.usefixtures("alone")
def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["dashboard", "me/coin"]) == 2
    assert "pip install '.[dashboard]'" in capsys.readouterr().err


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
    assert asked["filters"] == {"jobType": "method", "group": "quickstart"}
    (view,) = sent
    assert (view.entity, view.project, view.display_name) == ("me", "coin", "quickstart")
