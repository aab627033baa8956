"""What an experiment leaves for W&B, read back from its files alone, offline."""

import json
from pathlib import Path

import pytest

from coin.reporting import read_results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(finished, read_wandb):
    """The records of the experiment's runs, by the names of the runs and the records' types."""
    found = {}
    for folder in finished.glob("*/wandb/offline-run-*"):
        by_type = {}
        for record in read_wandb(folder):
            kind = record["type"]
            by_type.setdefault(kind, []).append(record[kind])
        (started,) = by_type["run"]
        found[started["display_name"]] = by_type
    return found


CURVES = {
    "tiny-base": {"train/loss", "val/accuracy"},
    "tiny-seed-0-expert-digits": {"train/loss", "val/accuracy"},
    "tiny-seed-0-expert-letters": {"train/loss", "val/accuracy"},
    "tiny-seed-0-distillation": {"train/loss"},
}


def test_every_training_has_a_run_with_curves_against_epochs(runs):
    assert runs.keys() == {*CURVES, "tiny-seed-0-evaluate"}
    for name, curves in CURVES.items():
        # By full names: of several patterns that fit, Lightning's * among them, W&B takes any.
        axes = {axis.get("name"): axis.get("step_metric") for axis in runs[name]["metric"]}
        assert {axes[metric] for metric in curves} == {"epoch"}
        logged = [row["item"].keys() for row in runs[name]["history"]]
        assert set().union(*logged) >= {*curves, "epoch"}


def test_the_evaluation_s_table_and_artifacts_are_in_the_seed_s_folder(runs, finished):
    wandb = finished / "seed-0/wandb"
    (table,) = wandb.glob("offline-run-*/files/media/table/results_*.table.json")
    rows = json.loads(table.read_text(encoding="utf-8"))["data"]
    assert len(rows) == len(read_results(finished / "seed-0"))
    files = []
    for artifact in runs["tiny-seed-0-evaluate"]["artifact"]:
        files += [Path(file["local_path"]) for file in artifact["manifest"]["contents"]]
    assert files
    # Staged where `wandb sync` of the folder finds them.
    assert all(file.is_relative_to(wandb) for file in files)
