"""Every shipped YAML is parsed by the command it is for, with its real class names."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from coin.cli import main

ROOT = Path(__file__).parent.parent / "configs"
EXPERTS = "--experts={a: a.safetensors, b: b.safetensors}"
TASKS = "{a: {class_path: MNIST5k}, b: {class_path: Digits}}"
OVERLAYS = ("foreign", "stand-ins", "frontier")
"""Experiments' files that are laid over another one."""

COMMANDS = {
    "experiment": ["run"],
    "cluster": ["run"],
    "expert": ["fit"],
    "merge": ["merge", EXPERTS],
    "evaluate": [
        "evaluate",
        "--model.experts={a: a.safetensors, b: b.safetensors}",
        f"--data.tasks={TASKS}",
    ],
    "logger": ["fit", "--data=MNIST5k"],
    "serve": ["serve", "runs/quickstart-3"],
}


@pytest.mark.usefixtures("packaged_encoder")
@pytest.mark.parametrize(
    "path",
    sorted(ROOT.rglob("*.yaml")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_configuration_is_parsed(path: Path, capsys: Any) -> None:
    room = path.relative_to(ROOT).parts[0]
    command, *rest = COMMANDS[room]
    over = path.stem in OVERLAYS or room == "cluster"
    under = ["-c", str(ROOT / "experiment/quickstart.yaml")] if over else []
    if path.parent.name == "paper":
        under = ["-c", str(path.parent / "base.yaml")]
        rest = ["--name=mine", f"--tasks={TASKS}"] if path.stem == "base" else []
    commands = [[command, *under, "-c", str(path), *rest]]
    if (
        path.read_text().splitlines()[-1].startswith("  strategy")
    ):  # a trainer section, for trainings as well
        commands.append(["fit", "-c", str(ROOT / "expert/mnist5k.yaml"), "-c", str(path)])
    for arguments in commands:
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--print_config"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert ("quantile:" if room == "serve" else "class_path") in printed


def test_resnet50_with_imagenet_weights_is_the_default_of_the_experts() -> None:
    experts = [path for path in (ROOT / "expert").glob("*.yaml") if path.stem != "mnist5k"]
    assert len(experts) >= 6
    for path in experts:
        text = path.read_text()
        assert "network: resnet50" in text
        assert "weights: IMAGENET1K_V2" in text


def test_every_file_says_how_to_run_it() -> None:
    for path in ROOT.rglob("*.yaml"):
        head = path.read_text().splitlines()[:3]
        assert head[0].startswith("# "), path
        if path.parent.name != "logger":
            assert any(str(path.relative_to(ROOT.parent)) in line for line in head), path


@pytest.mark.usefixtures("packaged_encoder")
def test_every_suite_of_the_study_is_an_experiment(capsys):
    makefile = (ROOT.parent / "Makefile").read_text(encoding="utf-8")
    lines = re.findall(r"^(?:SUITES_OF_INTENTS := )?(-c .*)$", makefile, flags=re.MULTILINE)
    assert len(lines) == 15
    for line in lines:
        with pytest.raises(SystemExit) as ended:
            main(["run", *shlex.split(line), "--print_config"])
        assert ended.value.code == 0
        assert "methods:" in capsys.readouterr().out
