"""The merging field's table in small: eight tasks, experts from folders, every method, the report, and the export."""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import small_clip
import torch
import transformers
import yaml
from safetensors.torch import load_file

from coin.cli import main
from coin.data import Digits, ImageFolder, MNIST5k, TaskData
from coin.networks import load_network
from coin.networks.hub import _configuration
from coin.reporting import read_results

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/experiment/clip8"
TURNED = {"012": 0, "345": 1, "678": 2, "179": 3, "035": 0, "2468": 1}
"""Folders of digits, and by how many right angles they are turned."""
SMALL: dict[str, Any] = {"max_train": 160, "max_test": 60}


def tasks(folder: Path) -> dict[str, TaskData]:
    """Return eight tasks of images that come with packages, some of them in folders."""
    size: dict[str, Any] = {"image_size": small_clip.SIDE, **SMALL}
    folders = {f"turned-{each}": ImageFolder(root=str(folder / f"turned-{each}"), **size) for each in TURNED}
    return {"mnist": MNIST5k(**size), "digits": Digits(**size), **folders}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP, and eight vision towers fine-tuned from it."""
    folder = tmp_path_factory.mktemp("clip")
    small_clip.write_clip(folder / "base", steps=200)
    for digits, turns in TURNED.items():
        small_clip.write_digits(folder / f"turned-{digits}", digits, turns)
    for name, task in tasks(folder).items():
        small_clip.write_expert(folder / f"clip_{name}", folder / "base", task, task.classes, steps=40)
    _configuration.cache_clear()
    return folder


@pytest.fixture
def config(places: Path, tmp_path: Path) -> dict[str, Any]:
    """The shipped experiment, with its networks and its tasks replaced by small ones."""
    found: dict[str, Any] = yaml.safe_load((CONFIGS / "vit-b-32.yaml").read_text())
    found["network"] |= {"name": f"hf/{places / 'base'}", "image_size": small_clip.SIDE}
    found["tasks"], found["expert"] = {}, {"checkpoints": {}}
    for name, task in tasks(places).items():
        head = {"zero_shot": {"prompts": small_clip.PROMPTS[:1], "classes": list(task.classes)}}
        root = {"root": str(places / name)} if isinstance(task, ImageFolder) else {}
        found["tasks"][name] = {"class_path": type(task).__name__, "init_args": {**SMALL, **root, "head": head}}
        found["expert"]["checkpoints"][name] = f"hf/{places / f'clip_{name}'}"
    found["calibration"] |= {"samples_per_task": 24, "batch_size": 12}
    found["trainer"]["accelerator"] = "cpu"
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump(found, sort_keys=False))
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("config")
def test_the_whole_table_in_small_and_its_export(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    assert main(["run", "-c", "clip.yaml", "--output=."]) == 0
    folder = tmp_path / "clip8-vit-b-32/seed-0"
    check_results(read_results(folder))
    assert "<h2>" in (folder / "report.html").read_text()
    check_export(folder, places)


def check_results(frame: pd.DataFrame) -> None:
    methods = {"base", "average", "task_arithmetic", "ties", "wudi", "regmean", "coin", "refit", "refit-4bit"}
    methods |= {"iso_c", "tsv_m", "replica-3bit-int8base", "none", "oracle"}
    assert set(frame.method) == methods
    assert (frame[frame.method == "oracle"].nda == 1).all()
    measured = frame[~frame.method.isin(["oracle", "none", "replica-3bit-int8base"])]
    own = measured[measured.decoder == "expert_head"]
    assert (measured.groupby("method").decoder.nunique() == 4).all()
    assert (own.forwards == 1).all()
    assert (own.losses == 8).all()
    assert own[["nda", "decoded_accuracy", "merge_passes", "merge_seconds", "memory_mib"]].notna().all(axis=None)
    # No two methods make the same tower.
    assert len(set(own.groupby("method").decoded_accuracy.apply(tuple))) >= len(own.method.unique()) - 2
    experts = frame[frame.task != "mean"].groupby("task").expert_accuracy.first()
    assert len(experts) == 8
    assert (experts > 0.5).all()


@torch.no_grad()
def check_export(folder: Path, places: Path) -> None:
    """The folder gives the same logits with transformers alone."""
    experts = {name: str(folder / f"experts/{name}/expert.safetensors") for name in tasks(places)}
    pixels = small_clip.pixels(tasks(places)["mnist"].splits.test.images()[:8])
    for coded in ("refit", "refit-4bit"):
        file = folder / f"coded/{coded}.safetensors"
        given = [f"--experts={json.dumps(experts)}"] if coded == "refit" else []  # else those of its run
        assert main(["export", str(file), f"--output={coded}", *given]) == 0
        features = transformers.CLIPVisionModelWithProjection.from_pretrained(coded).eval()(pixel_values=pixels)
        found = torch.nn.functional.normalize(features.image_embeds)
        expected = torch.nn.functional.normalize(load_network(file).network.vision(pixels).image_embeds)
        heads = load_file(f"{coded}/heads.safetensors")
        assert heads.keys() == experts.keys()
        for task, head in heads.items():
            logits = load_network(Path(experts[task])).network.head(expected)
            torch.testing.assert_close(found @ head.T, logits, rtol=1e-5, atol=1e-5)
