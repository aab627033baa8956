"""The evaluation of systems in memory gives the numbers of the evaluator."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

import coin
from coin.data import to_input
from coin.errors import CoinWarning, ConfigurationError, DataError, HeadError
from coin.modules import DecodingEvaluator
from coin.networks import load_network

PAIR = [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]]
EVERY = ["linear", "ridge", "feature_ridge", "expert_head"]
COLUMNS = [
    "decoder", "erased", "task", "expert_accuracy", "decoded_accuracy", "nda", "agreement", "residual",
    "decoder_passes", "memory_mib", "resident_mib", "forwards", "losses",
]  # fmt: skip


def networks_of(paths):
    return [load_network(Path(path)).network.train() for path in paths]


def batches_of(task):
    """Return a task's test samples in batches of seven."""
    images, labels = task.splits.test[:]
    inputs = to_input(images, 16)
    return list(zip(inputs.split(7), labels.split(7), strict=True))


def test_it_equals_the_evaluator(experts, coded, tasks, measure):
    measured = measure(DecodingEvaluator(experts, coded, EVERY))
    rows = [each.columns for each in measured if each.columns["method"] == "average"]
    expected = pd.DataFrame(rows)[COLUMNS].sort_values(
        ["decoder", "erased", "task"], ignore_index=True
    )
    system = coin.Coded(
        PAIR, networks_of(experts.values()), networks_of(coded), names=list(experts)
    )
    found = coin.evaluate(
        system,
        [batches_of(task) for task in tasks.tasks.values()],
        decoders=EVERY,
        calibration=list(tasks.calibrations().values()),
        erasures=system.code.erasures(),
    )
    assert list(found.columns) == COLUMNS
    assert list(found["decoder"].unique()) == EVERY
    ordered = found.sort_values(["decoder", "erased", "task"], ignore_index=True)
    pd.testing.assert_frame_equal(
        ordered, expected, rtol=1e-4, check_dtype=False
    )  # batches of other sizes
    networks = [*system.experts, *system.coded]
    assert all(network.training for network in networks)


class Named(nn.Linear):
    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x))


def test_by_default_each_expert_is_lost_alone_and_every_decoder_is_measured():
    torch.manual_seed(0)
    experts = [Named(6, 3), Named(6, 2)]
    code = coin.uniform(2)
    system = coin.Coded(code, experts, coin.merge_networks(coin.Average(), experts, code))
    inputs = [[{"x": torch.randn(9, 6)} for _ in range(3)] for _ in experts]
    pairs = [[(batch, torch.arange(9) % 2) for batch in batches] for batches in inputs]
    table = coin.evaluate(system, pairs, calibration=inputs)
    assert list(table["decoder"]) == [kind for kind in EVERY for _ in experts]
    assert list(table["task"]) == ["0", "1"] * 4
    assert (table["nda"] == 1).all()  # a linear network is its average
    assert (table["residual"] < 1e-5).all()


@pytest.fixture
def system():
    torch.manual_seed(0)
    experts = [nn.Linear(6, 3), nn.Linear(6, 3)]
    return coin.Coded([[0.5, 0.5]], experts, [nn.Linear(6, 3)])


INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
PAIRS = [(INPUTS, torch.zeros(4, dtype=torch.int64))]
MISTAKES = {
    "no calibration": (
        [PAIRS, PAIRS],
        {"decoders": None},
        "found no calibration samples to fit the decoder ridge on",
    ),
    "calibration of one": (
        [PAIRS, PAIRS],
        {"calibration": [[INPUTS]]},
        "calibration data of 1 tasks, expected 2",
    ),
    "an unknown decoder": ([PAIRS, PAIRS], {"decoders": ["cubic"]}, "found decoder='cubic'"),
    "one task": ([PAIRS], {}, "found loaders of 1 tasks, expected 2; give every expert's"),
    "a loss twice": ([PAIRS, PAIRS], {"erasures": [[0], [0]]}, "expected each loss once"),
    "no pairs": (
        [PAIRS, [INPUTS]],
        {},
        r"found a test batch of type Tensor, expected pairs \(inputs, labels\)",
    ),
    "no batches": ([PAIRS, []], {}, "found no test batches of task '1'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_missing_is_told(name, system):
    loaders, options, message = MISTAKES[name]
    with pytest.raises((ConfigurationError, DataError), match=message):
        coin.evaluate(system, loaders, **({"decoders": ["linear"]} | options))


def test_a_head_that_does_not_give_the_logits_is_left_out_unless_it_is_asked_for(system):
    odd = nn.Sequential(nn.Linear(6, 3), nn.Softmax(1))
    experts = [nn.Sequential(each) for each in system.experts]
    system = coin.Coded(system.code, [experts[0], odd], [nn.Sequential(system.coded[0])])
    with pytest.raises(HeadError, match="the logits of Sequential are not its head '0'"):
        coin.evaluate(system, [PAIRS, PAIRS], decoders=["expert_head"])
    with pytest.warns(
        CoinWarning, match="expert_head is left out: the logits of Sequential are not"
    ):
        table = coin.evaluate(system, [PAIRS, PAIRS], calibration=[[INPUTS]] * 2)
    assert list(table["decoder"].unique()) == EVERY[:3]
