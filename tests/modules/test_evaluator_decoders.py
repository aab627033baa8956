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
from coin.networks import load_network
from coin.networks.stages import stages_and_logits

CLASSES = (3, 3)
CODE = [[0.4, 0.6]]
CONFIGS = [
    "linear",
    "ridge",
    {"kind": "ridge", "fitted_on": "own"},
    DecoderConfig("feature_ridge"),
    {"kind": "feature_ridge", "features": "stages"},
    {"kind": "feature_ridge", "components": 4},
    DecoderConfig("feature_ridge", "stages", 4, "random", "own"),
]
NAMES = [
    "linear",
    "ridge",
    "ridge-own",
    "feature_ridge",
    "feature_ridge-stages",
    "feature_ridge-4",
    "feature_ridge-stages-4-random-own",
]


@pytest.fixture
def experts(write_experts):
    return write_experts(CLASSES)


@pytest.fixture
def tasks(tasks_of):
    return tasks_of(CLASSES)


def answers_of(paths, inputs):
    """The answers of two experts and a coded model to all inputs at once, with all stages."""
    with torch.no_grad():
        features, logits, widths = zip(
            *(stages_and_logits(load_network(Path(path)).network, inputs) for path in paths), strict=True
        )
    return Answers(torch.stack(logits[:2]), torch.stack(logits[2:]), features[:2], features[2:], widths[0])


@pytest.mark.slow
def test_every_configuration_equals_a_slow_loop(experts, write_coded, tasks, make_trainer):
    coded = write_coded(CODE, experts)
    evaluator = DecodingEvaluator(experts, coded, CONFIGS)
    make_trainer().test(evaluator, datamodule=tasks, verbose=False)
    paths = [*experts.values(), *coded]
    calibration = replace(answers_of(paths, tasks.calibration().inputs()), tasks=tasks.calibration().part)
    assert calibration.tasks.bincount().tolist() == [20, 20]
    configs = {DecoderConfig.of(config).name: config for config in CONFIGS}
    outcomes = {(o.variant.method, o.decoder, o.task): o for o in evaluator.outcomes}
    assert list(configs) == NAMES
    assert len(outcomes) == len(evaluator.outcomes) == 2 * (7 + 6 + 1)
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
        assert outcome.agreement == int((decoded == own).sum()) / len(own)
        assert outcome.confusion.trace() == int((decoded == own).sum())


def test_own_samples_cost_only_what_they_are(experts, write_coded, tasks, make_trainer):
    evaluator = DecodingEvaluator(experts, write_coded(CODE, experts), CONFIGS)
    make_trainer().test(evaluator, datamodule=tasks, verbose=False)
    samples = 40
    for outcome in evaluator.outcomes:
        if outcome.variant.method != "average":
            continue
        own = "-own" in outcome.decoder
        read = 0 if outcome.decoder == "linear" else samples / 2 if own else samples
        assert outcome.decoder_passes == 3 * read


@pytest.mark.parametrize(
    ("decoders", "widths"),
    [
        (["ridge", {"kind": "ridge", "fitted_on": "own"}], None),
        (["ridge", {"kind": "feature_ridge", "components": 4}], None),
        (["feature_ridge", {"kind": "feature_ridge", "features": "stages"}], (4, 8, 16, 32)),
    ],
)
def test_stages_are_taken_only_where_a_decoder_reads_them(experts, decoders, widths):
    answers = DecodingEvaluator(experts, decoders=decoders)(torch.zeros(2, 3, 16, 16))
    assert answers.feature_widths == widths
    reads = any(DecoderConfig.of(decoder).reads_features for decoder in decoders)
    assert (answers.expert_features is not None) == reads
    if reads:
        assert answers.expert_features[0].shape == (2, sum(widths or (32,)))


def test_mistakes_are_named(experts, synthetic, make_trainer):
    with pytest.raises(ConfigurationError, match="found decoder ridge-own twice"):
        DecodingEvaluator(experts, decoders=[{"kind": "ridge", "fitted_on": "own"}] * 2)
    with pytest.raises(ConfigurationError, match="found components=4 for ridge"):
        DecodingEvaluator(experts, decoders=[{"kind": "ridge", "components": 4}])
    few = Tasks({"task0": synthetic(key=0), "task1": synthetic(key=1)}, samples_per_task=1)
    evaluator = DecodingEvaluator(experts, decoders=[{"kind": "ridge", "fitted_on": "own"}])
    with pytest.raises(NumericalError, match="found 1 calibration samples of expert 0's own task"):
        make_trainer().test(evaluator, datamodule=few, verbose=False)
