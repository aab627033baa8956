"""Every shipped YAML is parsed by the command it is for, with its real class names."""

import re
import shlex
from pathlib import Path

import pytest

from coin.cli import main

ROOT = Path(__file__).parent.parent / "configs"
EXPERTS = "{a: a.safetensors, b: b.safetensors}"
TASKS = "{a: {class_path: MNIST5k}, b: {class_path: Digits}}"
OVERLAYS = ("foreign", "stand-ins", "frontier")
"""Experiments' files that are laid over another one."""

COMMANDS = {
    "experiment": ["run"],
    "cluster": ["run"],
    "expert": ["fit"],
    "merge": ["merge", f"--experts={EXPERTS}"],
    "evaluate": ["evaluate", f"--model.experts={EXPERTS}", f"--data.tasks={TASKS}"],
    "logger": ["fit", "--data=MNIST5k"],
    "serve": ["serve", "runs/quickstart-3"],
}


@pytest.fixture
def parsed(packaged_encoder, capsys):
    """Return a function that returns the configuration that a command prints."""

    def parse(arguments):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--print_config"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    return parse


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_configuration_is_parsed(path, parsed):
    room = path.relative_to(ROOT).parts[0]
    command, *rest = COMMANDS[room]
    under = []
    if path.stem in OVERLAYS or room == "cluster":
        under = ["-c", str(ROOT / "experiment/quickstart.yaml")]
    if path.parent.name == "paper":
        under = ["-c", str(path.parent / "base.yaml")]
    if path.stem == "base":
        rest = ["--name=mine", f"--tasks={TASKS}"]
    printed = parsed([command, *under, "-c", str(path), *rest])
    assert ("quantile:" if room == "serve" else "class_path") in printed
    *_, last = path.read_text().splitlines()
    if last.startswith("  strategy"):  # a trainer section, for trainings as well
        assert "class_path" in parsed(["fit", "-c", "mnist5k", "-c", str(path)])


def test_resnet50_with_imagenet_weights_is_the_default_of_the_experts():
    experts = [path for path in (ROOT / "expert").glob("*.yaml") if path.stem != "mnist5k"]
    assert len(experts) >= 6
    for path in experts:
        text = path.read_text()
        assert "network: resnet50" in text
        assert "weights: IMAGENET1K_V2" in text


def test_every_file_says_how_to_run_it():
    for path in ROOT.rglob("*.yaml"):
        head = path.read_text().splitlines()[:3]
        assert head[0].startswith("# "), path
        if path.parent.name != "logger":
            assert any(str(path.relative_to(ROOT.parent)) in line for line in head), path


def test_every_suite_of_the_study_is_an_experiment(parsed):
    makefile = (ROOT.parent / "Makefile").read_text(encoding="utf-8")
    lines = re.findall(r"(?m)^(?:SUITES_OF_INTENTS := )?(-c .*)$", makefile)
    assert len(lines) == 15
    for line in lines:
        assert "methods:" in parsed(["run", *shlex.split(line)])
