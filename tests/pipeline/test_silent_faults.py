"""The study of experts that answer wrongly, on a finished experiment."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from coin.coding import Answers, DecoderConfig, fault_score, make_decoder
from coin.coding.ready import uniform
from coin.data.embedded import Digits

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The study, of the untouched expert, and of one whose last layer's answers are turned around."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    from notebooks import silent_faults

    def faults(expert: nn.Module, start: nn.Module) -> dict[str, nn.Module]:
        same, turned = (silent_faults.between(start, expert, 1.0) for _ in range(2))
        turned.fc.weight.neg_()
        return {"none": expert, "all the way": same, "turned": turned}

    monkeypatch.setattr(silent_faults, "faults", faults)
    return silent_faults


@pytest.fixture
def rows(finished: Path, study: ModuleType) -> pd.DataFrame:
    (seed,) = finished.glob("seed-*")
    rows = pd.DataFrame(study.measure(seed, "average", [4], 40))
    assert set(rows.method) == {"average", "none"}
    return rows[rows.method == "average"]


def test_an_expert_that_works_is_as_odd_as_ever(rows: pd.DataFrame) -> None:
    working = rows[rows.fault != "turned"]
    assert list(working.oddness) == pytest.approx(list(working.usual))
    assert list(working.faulty_accuracy) == list(working.expert_accuracy)
    assert (working.alarm == working.false_alarm).all()
    assert (working.false_alarm < 0.2).all()  # a few validation samples are not quite like the test's


def test_an_expert_of_the_opposite_opinion_is_exposed_and_named(rows: pd.DataFrame) -> None:
    turned = rows[rows.fault == "turned"]
    assert set(turned.task) == set(rows.task)
    assert (turned.faulty_accuracy < turned.expert_accuracy).all()
    assert (turned.oddness > 1.2 * turned.usual).all()
    assert (turned.alarm > 0.5).all()
    assert (turned.named > 0.5).all()


def test_no_threshold_is_set_on_the_batches_that_are_scored(
    finished: Path, study: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (seed,) = finished.glob("seed-*")
    pooled, read = study.pooled, []

    def noisy_tests(tasks: Any, split: str, samples: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        read.append(split)
        inputs, labels, which = pooled(tasks, split, samples)
        return (inputs + 2 * torch.randn_like(inputs) if split == "test" else inputs), labels, which

    monkeypatch.setattr(study, "pooled", noisy_tests)
    rows = pd.DataFrame(study.measure(seed, "average", [4], 40))
    assert read == ["test", "validation"]
    working = rows[rows.fault != "turned"]
    assert (working.false_alarm > 0.5).all()  # test inputs unlike the others raise alarms, and the column says so
    assert (working.alarm == working.false_alarm).all()


def test_many_batches_at_once_are_as_odd_as_one_at_a_time(study: ModuleType) -> None:
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 50, 4, generator=draw)
    answers = Answers(outputs, outputs.mean(0, keepdim=True) + 0.1 * torch.randn(1, 50, 4, generator=draw))
    code = uniform(3)
    decoders = [make_decoder(DecoderConfig.named("ridge"), code, [lost]).fit(answers) for lost in range(3)]
    new = answers.select(slice(0, 20))
    found = study.odds(decoders, answers, new, 5, batches=7)
    again = torch.Generator().manual_seed(5)
    for one in found:
        batch = torch.randperm(50, generator=again)[:5]
        torch.testing.assert_close(one, fault_score(decoders, answers.select(batch), new))


def test_tasks_without_validation_samples_are_refused(study: ModuleType) -> None:
    with pytest.raises(SystemExit, match="validation_share"):
        study.pooled({"digits": Digits(validation_share=0.0)}, "validation")
