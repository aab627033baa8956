"""How an experiment fine-tunes its experts: which parameters of which task's expert are trained."""

import pytest
from safetensors.torch import load_file


@pytest.mark.parametrize(
    ("task", "classes", "trained"), [("letters", 6, {"fc"}), ("digits", 10, {"stem", "fc"})]
)
def test_a_task_may_train_its_head_alone(task, classes, trained, run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    head = "--expert.overrides={letters: {trainable: [head]}}"
    options = ["--base=null", "--expert.epochs=1", "--expert.freeze_batchnorm=true", head]
    assert run(f"--only={task}", *options) == 0
    expert = load_file(tmp_path / f"tiny/seed-0/experts/{task}/expert.safetensors")
    initial = load_file(tmp_path / f"tiny/base/initial-{classes}.safetensors")
    changed = {name for name, tensor in initial.items() if not expert[name].equal(tensor)}
    parts = {name.partition(".")[0] for name in changed}
    assert parts & {"stem", "fc"} == trained
    assert not any("running" in name for name in changed)
