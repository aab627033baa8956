"""The evaluation of systems in memory gives the numbers of the evaluator."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import coin
from coin.data import to_input
from coin.errors import ConfigurationError, DataError
from coin.modules import DecodingEvaluator
from coin.networks import load_network

CLASSES = (3, 2, 3)
PAIR = [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]]
SHARED = ["expert_accuracy", "decoded_accuracy", "nda", "agreement", "residual", "decoder_passes"]
COSTS = ["memory_mib", "resident_mib", "forwards", "losses"]
COLUMNS = ["decoder", "erased", "task", *SHARED, *COSTS]


def batches_of(task):
    images, labels = task.splits.test[:]
    return [(to_input(images[start : start + 7], 16), labels[start : start + 7]) for start in range(0, len(labels), 7)]


def test_it_equals_the_evaluator(write_experts, write_coded, tasks_of, make_trainer):
    experts, tasks = write_experts(CLASSES), tasks_of(CLASSES)
    decoders = ["linear", "ridge", "feature_ridge", "expert_head"]
    paths = write_coded(PAIR, experts)
    evaluator = DecodingEvaluator(experts, paths, decoders)
    make_trainer().test(evaluator, datamodule=tasks, verbose=False)
    networks = [[load_network(Path(path)).network.train() for path in each] for each in (experts.values(), paths)]
    system = coin.Coded(coin.Code(PAIR), *networks, names=list(experts))
    loaders = [batches_of(task) for task in tasks.tasks.values()]
    calibration = list(tasks.calibrations().values())
    alone = coin.evaluate(system, loaders, decoders=decoders, calibration=calibration)
    assert list(alone.columns) == COLUMNS
    assert len(alone) == 4 * 3
    options = {"calibration": calibration, "erasures": system.code.erasures()}
    found = coin.evaluate(system, loaders, decoders=decoders, **options)
    singles = found[~found.erased.str.contains("+", regex=False)].reset_index(drop=True)
    memories = ["memory_mib", "resident_mib"]
    assert singles.drop(columns=memories).equals(alone.drop(columns=memories))
    assert found.resident_mib.equals(found.memory_mib)  # whole networks
    more = (singles.memory_mib > alone.memory_mib).groupby(alone.decoder).all()
    assert set(more.index[more]) == {"ridge", "feature_ridge"}  # regressions for more erasures
    checked = 0
    for outcome in evaluator.measurements:
        if outcome.columns["method"] == "average":
            own = (found.decoder == outcome.columns["decoder"]) & (found.erased == outcome.columns["erased"])
            (row,) = found[own & (found.task == outcome.columns["task"])].to_dict("records")
            for column in (*SHARED, *COSTS):
                assert row[column] == pytest.approx(outcome.columns[column], rel=1e-4)
            checked += 1
    assert checked == len(found) == 4 * (3 + 3 * 2)
    assert all(network.training for group in networks for network in group)
    forwards = found.groupby(["decoder", "erased"]).forwards.agg(list)
    assert [forwards[name, "task0"] for name in ("linear", "expert_head")] == [[4], [1]]
    assert forwards["ridge", "task0+task1"] == [3, 3]
    linear = coin.evaluate(system, loaders, decoders=["linear"])
    assert linear.equals(alone[alone.decoder == "linear"])


def test_batches_by_name_and_an_exact_system():
    torch.manual_seed(0)

    class Named(nn.Linear):
        def forward(self, x):
            return SimpleNamespace(logits=super().forward(x))

    experts, code = [Named(6, 3), Named(6, 2)], coin.Code([[0.5, 0.5]])

    (coded,) = coin.merge_networks(coin.Average(), experts, code)
    inputs = [[{"x": torch.randn(9, 6)} for _ in range(3)] for _ in experts]
    pairs = [[(batch, torch.arange(9) % 2) for batch in batches] for batches in inputs]
    table = coin.evaluate(coin.Coded(code, experts, [coded]), pairs, calibration=inputs)
    assert list(table.decoder) == [kind for kind in coin.DecoderKind for _ in range(2)]
    assert list(table.task) == ["0", "1"] * 4
    assert (table.nda == 1).all()
    assert (table.residual < 1e-5).all()


def test_what_is_missing_is_told():
    torch.manual_seed(0)
    experts = [nn.Linear(6, 3) for _ in range(3)]
    system = coin.Coded(coin.Code([[0.5, 0.5]]), experts[:2], experts[2:])
    pairs, inputs = [(torch.randn(4, 6), torch.zeros(4))], [torch.randn(4, 6)]
    linear = {"decoders": ["linear"]}
    for loaders, options, kind, message in (
        ([pairs, pairs], {}, ConfigurationError, "found no calibration samples to fit the decoder ridge on; give them"),
        ([pairs, pairs], {"calibration": [inputs]}, ConfigurationError, "found calibration data of 1 tasks, expected"),
        ([pairs, pairs], {"decoders": ["cubic"]}, ValueError, "found decoder='cubic'"),
        ([pairs], linear, ConfigurationError, "found loaders of 1 tasks, expected 2; give every expert's"),
        ([pairs, inputs], linear, DataError, r"found a test batch of type Tensor, expected pairs \(inputs, labels\)"),
        ([pairs, []], linear, DataError, "found no test batches of task '1'"),
    ):
        with pytest.raises(kind, match=message):
            coin.evaluate(system, loaders, **options)
