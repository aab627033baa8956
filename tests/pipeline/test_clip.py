"""The merging field's table in small: eight tasks, experts from folders, every method, the report, and the export."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import small_clip
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from coin.cli import main
from coin.data import Digits, ImageFolder, MNIST5k, TaskData
from coin.data.transform import to_input
from coin.files.atomic import sha256_of
from coin.files.safetensors import load_provenance
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
    for method in found["methods"]:
        if method["class_path"] == "ReadoutDistillation":
            method["init_args"] |= {"steps": 4, "batch_size": 16}
    found["trainer"]["accelerator"] = "cpu"
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump(found, sort_keys=False))
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("config")
def test_the_whole_table_in_small_and_its_export(
    places: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    assert main(["run", "-c", "clip.yaml", "--output=."]) == 0
    folder = tmp_path / "clip8-vit-b-32/seed-0"
    check_results(read_results(folder))
    assert "<h2>" in (folder / "report.html").read_text()
    check_experts(folder, places)
    capfd.readouterr()
    assert main(["run", "-c", "clip.yaml", "--output=.", "--dry-run", "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["to_do"] == 0
    check_export(folder, tmp_path, places)


def check_results(frame: pd.DataFrame) -> None:
    methods = {"base", "average", "task_arithmetic", "ties", "wudi", "regmean", "coin", "refit", "refit-4bit"}
    methods |= {"iso_c", "tsv_m", "readout_distillation", "replica-3bit-int8base", "none", "oracle"}
    assert set(frame.method) == methods
    assert (frame[frame.method == "oracle"].nda == 1).all()
    measured = frame[~frame.method.isin(["oracle", "none", "replica-3bit-int8base"])]
    own = measured[measured.decoder == "expert_head"]
    assert (measured.groupby("method").decoder.nunique() == 5).all()
    assert (own.forwards == 1).all()
    assert (own.losses == 8).all()
    assert own[["nda", "decoded_accuracy", "merge_passes", "merge_seconds", "memory_mib"]].notna().all(axis=None)
    # No two methods make the same tower.
    assert len(set(own.groupby("method").decoded_accuracy.apply(tuple))) >= len(own.method.unique()) - 2
    experts = frame[frame.task != "mean"].groupby("task").expert_accuracy.first()
    assert len(experts) == 8
    assert (experts > 0.5).all()


@torch.no_grad()
def check_experts(folder: Path, places: Path) -> None:
    """The experts answer as transformers' own CLIP with their tower, each by its own classes."""
    for name, task in tasks(places).items():
        file = load_network(folder / f"experts/{name}/expert.safetensors")
        whole = transformers.CLIPModel.from_pretrained(places / "base")
        tuned = transformers.CLIPVisionModel.from_pretrained(places / f"clip_{name}")
        whole.vision_model.load_state_dict(getattr(tuned, "vision_model", tuned).state_dict())
        images = task.splits.test.images()[:8]
        expected = small_clip.similarities(whole.eval(), images, task.classes)
        found = file.network(to_input(images, small_clip.SIDE))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        provenance = load_provenance(file.path)
        assert provenance["head"]["zero_shot"]["classes"] == list(task.classes)
        weights = places / f"clip_{name}/model.safetensors"
        assert provenance["sha256"][str(weights)] == sha256_of(weights)


# What others run: transformers, and no coin.
THEIRS = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection
tower = CLIPVisionModelWithProjection.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    features = tower(pixel_values=load_file("pixels.safetensors")["pixels"]).image_embeds
features = features / features.norm(dim=1, keepdim=True)
heads = load_file(sys.argv[1] + "/heads.safetensors")
save_file({task: features @ head.T for task, head in heads.items()}, "logits.safetensors")
assert not any(name.split(".")[0] == "coin" for name in sys.modules)
"""


@torch.no_grad()
def check_export(folder: Path, tmp_path: Path, places: Path) -> None:
    """The folder gives the same logits in a process without coin."""
    experts = {name: str(folder / f"experts/{name}/expert.safetensors") for name in tasks(places)}
    images = tasks(places)["mnist"].splits.test.images()[:8]
    save_file({"pixels": small_clip.pixels(images)}, tmp_path / "pixels.safetensors")
    for coded in ("refit", "refit-4bit"):
        file = folder / f"coded/{coded}.safetensors"
        given = [f"--experts={json.dumps(experts)}"] if coded == "refit" else []  # else those of its run
        assert main(["export", str(file), f"--output={coded}", *given]) == 0
        subprocess.run([sys.executable, "-I", "-c", THEIRS, coded], check=True, timeout=300, cwd=tmp_path)
        network = load_network(file).network
        features = network.vision(small_clip.pixels(images)).image_embeds
        answers = load_file(tmp_path / "logits.safetensors")
        assert answers.keys() == experts.keys()
        for task, logits in answers.items():
            head = load_network(Path(experts[task])).network.head
            torch.testing.assert_close(logits, head(torch.nn.functional.normalize(features)), rtol=1e-5, atol=1e-5)


@pytest.fixture
def random_clip(tmp_path: Path) -> None:
    """A random CLIP, and an experiment of two tasks, one of which is fine-tuned here."""
    small_clip.write_clip(tmp_path / "base")
    _configuration.cache_clear()
    transformers.CLIPVisionModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "tuned")
    (tmp_path / "two.yaml").write_text(TWO)


TWO = """
name: two
network: {name: hf/base, image_size: 32, weights: pretrained, options: {head: zero_shot}}
tasks:
  digits: {class_path: Digits, init_args: {max_train: 80, max_test: 40, head: {zero_shot: digits.yaml}}}
  letters: {class_path: Glyphs, init_args: {classes: a-d, train_per_class: 20, test_per_class: 9,
    head: {zero_shot: {prompts: ['a small {}']}}}}
expert: {epochs: 1, lr: 0.01, batch_size: 32, checkpoints: {digits: hf/tuned}}
calibration: {samples_per_task: 12, batch_size: 12}
methods: [{class_path: Average}, {class_path: TaskArithmetic}]
decoders: [expert_head]
"""
DIGITS = "prompts: ['a photo of the character {}.']\nclasses: ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']\n"


def run(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the last line that a refused run writes."""
    assert main(["run", "-c", "two.yaml", "--output=.", *options]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("random_clip", "no_reports")
def test_an_expert_that_is_trained_here_keeps_its_head(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text(DIGITS)
    assert main(["run", "-c", "two.yaml", "--output=."]) == 0
    network = load_network(tmp_path / "two/seed-0/experts/letters/expert.safetensors").network
    initial = load_network(tmp_path / "two/base/initial-4.safetensors").network
    whole = transformers.CLIPModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        text = whole.text_model(**small_clip.texts("abcd", ["a small {}"])).pooler_output
        head = torch.nn.functional.normalize(whole.text_projection(text), dim=1) * whole.logit_scale.exp()
    torch.testing.assert_close(network.head.weight, head, rtol=1e-4, atol=1e-5)
    assert not initial.head.weight.any()
    changed = [name for name, each in network.named_parameters() if not torch.equal(each, initial.get_parameter(name))]
    assert len(changed) > 30
    frame = read_results(tmp_path / "two/seed-0")
    assert set(frame.method) == {"average", "task_arithmetic", "none"}
    assert main(["run", "-c", "two/seed-0/config.yaml", "--output=.", "--name=again"]) == 0
    assert read_results(tmp_path / "again/seed-0").nda.tolist() == frame.nda.tolist()


@pytest.mark.usefixtures("random_clip")
@pytest.mark.parametrize(
    ("head", "options", "told"),
    [
        (None, [], "cannot read 'digits.yaml'"),
        ("prompts: [a photo]", [], "found head.zero_shot.prompts ['a photo'], expected a list of texts with {} for"),
        ("prompts: ['{}']\nclasses: [0, 1]", [], "found head.zero_shot.classes [0, 1], expected a list of distinct"),
        ("[1]", [], "found head {'zero_shot': 'digits.yaml'}, expected head: {zero_shot: {prompts:"),
        ("prompts: ['{}']\nclasses: [a, b]", [], "Digits has 10 classes and head.zero_shot.classes names 2; give one"),
        (DIGITS, ["--network.options={}"], "found the task 'digits' with head.zero_shot and the network 'hf/base'"),
        (DIGITS, ["--expert.checkpoints.digits=hf/else"], "hf/else"),
    ],
)
def test_what_does_not_fit_is_one_line(
    head: str | None, options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if head is not None:
        (tmp_path / "digits.yaml").write_text(head)
    assert told in run(capsys, *options)


@pytest.mark.usefixtures("random_clip")
def test_a_task_without_a_head_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two.yaml").write_text(TWO.replace(", head: {zero_shot: digits.yaml}", ""))
    assert "found the task 'digits' without head.zero_shot and the network 'hf/base'" in run(capsys)


def test_without_a_network_one_line_names_the_tower(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    _configuration.cache_clear()
    assert main(["run", f"--config={CONFIGS / 'vit-b-32.yaml'}"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("coin: error: found network.name 'hf/openai/clip-vit-base-patch32', expected hf/FOLDER with")
