"""How an experiment fine-tunes its experts: the options that ``coin fit`` has, for all tasks or one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from coin.cli import main
from coin.commands.run import read_experiment


@pytest.fixture
def make_expert(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes one expert and returns its tensors, and those of its shared initialisation."""
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def make(task: str, *, network: Any = None, tasks: Any = None, **expert: Any) -> tuple[Any, Any]:
        over = tmp_path / "over.yaml"
        own = {name: value for name, value in {"network": network, "tasks": tasks}.items() if value}
        sections = {"expert": {"epochs": 1, **expert}, "base": None, "methods": [{"class_path": "Average"}], **own}
        over.write_text(yaml.safe_dump(sections))
        command = ["run", "-c", str(config), "-c", str(over), f"--output={tmp_path}", "--only", task]
        assert main(command) == 0
        classes = {"digits": 10, "letters": 6}[task]
        return (
            load_file(tmp_path / f"tiny/seed-0/experts/{task}/expert.safetensors"),
            load_file(tmp_path / f"tiny/base/initial-{classes}.safetensors"),
        )

    return make


def changed(expert: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]) -> set[str]:
    assert expert.keys() == initial.keys()
    return {name for name in expert if not torch.equal(expert[name], initial[name])}


def test_a_task_may_train_its_head_alone(make_expert: Any) -> None:
    own = {"letters": {"trainable": ["head"]}}
    found = changed(*make_expert("letters", freeze_batchnorm=True, overrides=own))
    assert found == {"fc.weight", "fc.bias"}
    found = changed(*make_expert("digits", freeze_batchnorm=True, overrides=own))
    assert {"stem.0.weight", "stem.1.weight", "fc.weight"} <= found
    assert not any("running" in name for name in found)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("expert.overrides.letters={trainable: [layer4.*]}", "found trainable pattern 'layer4.*', which matches no"),
        ("expert.optimizer=Adm", "module 'torch.optim' has no attribute 'Adm'"),
        (
            "expert={optimizer: {class_path: AdamW, init_args: {momentum: 0.9}}}",
            "unexpected keyword argument 'momentum'",
        ),
        ("base.trainable=[fc.wieght]", "the nearest names are fc.weight"),
    ],
)
def test_what_does_not_fit_the_network_is_told_before_the_base_is_trained(
    section: str, message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-c", str(config), f"--output={tmp_path}", f"--{section}"]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("coin: error: ")
    assert message in line
    assert "pretraining" not in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 1e-3),
        ("freeze_batchnorm", True),
        ("weight_decay", None),
        ("optimizer", "AdamW"),
        ("lr_scheduler", {"class_path": "StepLR", "init_args": {"step_size": 3}}),
        ("trainable", ["head", "fc.*"]),
    ],
)
def test_overrides_on_the_command_line_are_plain_values_of_their_types(name: str, value: Any, config: Path) -> None:
    given = f"--expert.overrides.letters.{name}={value if isinstance(value, str) else json.dumps(value)}"
    found = read_experiment(["-c", str(config), given])[0].config["expert"]["overrides"]["letters"][name]
    assert found == value
    assert type(found) is type(value)
