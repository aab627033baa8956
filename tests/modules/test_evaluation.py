"""The evaluation of systems in memory gives the numbers of the evaluator."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

import coin
from coin.data import to_input
from coin.errors import CoinWarning, ConfigurationError, DataError, HeadError
from coin.modules import DecodingEvaluator

PAIR = [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]]
EVERY = ["linear", "ridge", "feature_ridge", "expert_head"]
KEYS = ["decoder", "erased", "task"]
COLUMNS = [
    *KEYS, "expert_accuracy", "decoded_accuracy", "nda", "agreement", "residual",
    "decoder_passes", "memory_mib", "resident_mib", "forwards", "losses",
]  # fmt: skip


def test_it_equals_the_evaluator(experts, coded, tasks, measure_rows, networks_of):
    rows = measure_rows(DecodingEvaluator(experts, coded, EVERY))
    expected = pd.DataFrame([row for row in rows if row["method"] == "average"])
    networks = [network.train() for network in networks_of([*experts.values(), *coded])]
    system = coin.Coded(PAIR, networks[:3], networks[3:], names=list(experts))
    loaders = []
    for task in tasks.tasks.values():
        images, labels = task.splits.test[:]
        batches = zip(to_input(images, 16).split(7), labels.split(7), strict=True)
        loaders.append(list(batches))
    found = coin.evaluate(
        system,
        loaders,
        decoders=EVERY,
        calibration=list(tasks.calibrations().values()),
        erasures=system.code.erasures(),
    )
    assert list(found.columns) == COLUMNS
    assert list(found["decoder"].unique()) == EVERY
    pd.testing.assert_frame_equal(
        found.set_index(KEYS).sort_index(),
        expected[COLUMNS].set_index(KEYS).sort_index(),
        rtol=1e-4,  # batches of other sizes
        check_dtype=False,
    )
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


INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
PAIRS = [(INPUTS, torch.zeros(4, dtype=torch.int64))]


def system_of(*experts):
    return coin.Coded([[0.5, 0.5]], experts, [nn.Sequential(nn.Linear(6, 3))])


MISTAKES = {
    "found no calibration samples to fit the decoder ridge on": (
        [PAIRS, PAIRS],
        {"decoders": None},
    ),
    "calibration data of 1 tasks, expected 2": ([PAIRS, PAIRS], {"calibration": [[INPUTS]]}),
    "found loaders of 1 tasks, expected 2; give every expert's": ([PAIRS], {}),
    "expected each loss once": ([PAIRS, PAIRS], {"erasures": [[0], [0]]}),
    r"found a test batch of type Tensor, expected pairs \(inputs, labels\)": (
        [PAIRS, [INPUTS]],
        {},
    ),
    "found no test batches of task '1'": ([PAIRS, []], {}),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_is_missing_is_told(message):
    loaders, options = MISTAKES[message]
    system = system_of(nn.Linear(6, 3), nn.Linear(6, 3))
    with pytest.raises((ConfigurationError, DataError), match=message):
        coin.evaluate(system, loaders, **({"decoders": ["linear"]} | options))


def test_a_head_that_does_not_give_the_logits_is_left_out_unless_it_is_asked_for():
    odd = nn.Sequential(nn.Linear(6, 3), nn.Softmax(1))
    system = system_of(nn.Sequential(nn.Linear(6, 3)), odd)
    with pytest.raises(HeadError, match="the logits of Sequential are not its head '0'"):
        coin.evaluate(system, [PAIRS, PAIRS], decoders=["expert_head"])
    left_out = r"^expert_head is left out: the logits of Sequential are not [^\n]*$"
    with pytest.warns(CoinWarning, match=left_out):
        table = coin.evaluate(system, [PAIRS, PAIRS], calibration=[[INPUTS]] * 2)
    assert list(table["decoder"].unique()) == EVERY[:3]
