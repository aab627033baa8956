"""How an experiment fine-tunes its experts: which parameters of which task's expert are trained."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from coin.cli import main


@pytest.mark.parametrize("task", ["letters", "digits"])
def test_a_task_may_train_its_head_alone(
    task: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    head = "--expert.overrides={letters: {trainable: [head]}}"
    options = ["--base=null", "--expert.epochs=1", "--expert.freeze_batchnorm=true", head]
    command = ["run", "-c", str(config), f"--output={tmp_path}", f"--only={task}", *options]
    assert main(command) == 0
    classes = {"digits": 10, "letters": 6}[task]
    expert = load_file(tmp_path / f"tiny/seed-0/experts/{task}/expert.safetensors")
    initial = load_file(tmp_path / f"tiny/base/initial-{classes}.safetensors")
    changed = {name for name, tensor in initial.items() if not expert[name].equal(tensor)}
    if task == "letters":
        assert changed == {"fc.weight", "fc.bias"}
    else:
        assert changed > {"stem.0.weight", "stem.1.weight", "fc.weight"}
        assert not any("running" in name for name in changed)
