"""Decoders with options in the evaluator."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coin.coding import Answers, Code, DecoderConfig, make_decoder
from coin.data import to_input
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError, NumericalError
from coin.modules import DecodingEvaluator
from coin.networks import features_and_logits, load_network

CLASSES = (3, 3)
CODE = [[0.4, 0.6]]
CONFIGS = [
    "linear",
    "ridge",
    {"kind": "ridge", "fitted_on": "own"},
    DecoderConfig("feature_ridge"),
    {"kind": "feature_ridge", "fitted_on": "own"},
    {"kind": "feature_ridge", "survivors": False},
]
NAMES = ["linear", "ridge", "ridge-own", "feature_ridge", "feature_ridge-own", "feature_ridge-alone"]


@pytest.fixture
def experts(write_experts):
    return write_experts(CLASSES)


@pytest.fixture
def tasks(tasks_of):
    return tasks_of(CLASSES)


def answers_of(paths, inputs):
    """The answers of two experts and a coded model to all inputs at once."""
    with torch.no_grad():
        runs = [features_and_logits(load_network(Path(path)).network, inputs) for path in paths]
    return Answers.of_servers(runs, 2)


@pytest.mark.slow
def test_every_configuration_equals_a_slow_loop(experts, write_coded, tasks, make_trainer):
    coded = write_coded(CODE, experts)
    evaluator = DecodingEvaluator(experts, coded, CONFIGS)
    make_trainer().test(evaluator, datamodule=tasks, verbose=False)
    paths = [*experts.values(), *coded]
    calibration = replace(answers_of(paths, tasks.calibration().inputs()), tasks=tasks.calibration().part)
    assert calibration.tasks.bincount().tolist() == [20, 20]
    configs = {DecoderConfig.of(config).name: config for config in CONFIGS}
    outcomes = {(o.columns["method"], o.columns["decoder"], o.columns["task"]): o for o in evaluator.outcomes}
    assert list(configs) == NAMES
    assert len(outcomes) == len(evaluator.outcomes) == 2 * (6 + 4 + 1)
    for (method, name, task), outcome in outcomes.items():
        if method == "oracle":
            assert name == "linear"
            continue
        place = list(experts).index(task)
        test = answers_of(paths, to_input(tasks.tasks[task].splits.test.images(), 16))
        seen, fitted = test, calibration
        if method == "none":
            seen, fitted = test.without_coded(), calibration.without_coded()
        decoded = make_decoder(configs[name], Code(CODE), [place]).fit(fitted).decode(seen)[0].argmax(1)
        own = test.experts[place].argmax(1)
        assert outcome.columns["agreement"] == int((decoded == own).sum()) / len(own)
        assert outcome.confusion.trace() == int((decoded == own).sum())


def test_own_samples_cost_only_what_they_are(experts, write_coded, tasks, make_trainer):
    evaluator = DecodingEvaluator(experts, write_coded(CODE, experts), CONFIGS)
    make_trainer().test(evaluator, datamodule=tasks, verbose=False)
    samples = 40
    for outcome in evaluator.outcomes:
        if outcome.columns["method"] != "average":
            continue
        own = "-own" in outcome.columns["decoder"]
        read = 0 if outcome.columns["decoder"] == "linear" else samples / 2 if own else samples
        assert outcome.columns["decoder_passes"] == (2 if "alone" in outcome.columns["decoder"] else 3) * read


def test_mistakes_are_named(experts, synthetic, make_trainer):
    with pytest.raises(ConfigurationError, match="found decoder ridge-own twice"):
        DecodingEvaluator(experts, decoders=[{"kind": "ridge", "fitted_on": "own"}] * 2)
    few = Tasks({"task0": synthetic(key=0), "task1": synthetic(key=1)}, samples_per_task=1)
    evaluator = DecodingEvaluator(experts, decoders=[{"kind": "ridge", "fitted_on": "own"}])
    with pytest.raises(NumericalError, match="found 1 calibration samples of expert 0's own task"):
        make_trainer().test(evaluator, datamodule=few, verbose=False)
