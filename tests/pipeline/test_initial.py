"""The shared initialisation of tasks with different class counts."""

from pathlib import Path

import torch

from coin.commands.run import read_experiment
from coin.networks import load_network
from coin.pipeline.experiment import Experiment
from coin.pipeline.plan import plan
from coin.pipeline.run import execute
from coin.pipeline.steps.train import WriteInitial


def make_initial(experiment: Experiment) -> list[Path]:
    """Make the shared initialisation, and return its files, that with the most classes first."""
    steps = [step for step in plan(experiment) if step.name == "base" or "initial" in step.name]
    for step in steps:
        execute(step, step.name)
    return [step.output for step in steps if isinstance(step, WriteInitial)]


def test_experts_of_different_class_counts_start_from_one_body(config: Path, tmp_path: Path) -> None:
    experiment, _ = read_experiment(["-c", str(config), f"--output={tmp_path}", "--base=null"])
    ten, six = (load_network(path).network.state_dict() for path in make_initial(experiment))
    differing = [name for name in ten if ten[name].shape != six[name].shape or not torch.equal(ten[name], six[name])]
    assert 0 < len(differing) <= 2
    assert all(torch.equal(ten[name][:6], six[name]) for name in differing)
