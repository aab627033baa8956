from pathlib import Path

import pytest
import torch
from torch import nn

import coin
from coin.callbacks import ExpertExport, FisherEstimator
from coin.coding import DecoderKind
from coin.coding.metrics import DecodingAccuracy
from coin.core.devices import multiplies_in_bfloat16
from coin.data import Augmentation
from coin.data.loading import Batches
from coin.errors import ConfigurationError
from coin.merging.expert_sources import ExpertFiles
from coin.modules import DecodingEvaluator, DistillationModule, Expert
from coin.networks import load_network
from coin.statistics.files import open_statistic

SMALL = {"network": "small_resnet", "image_size": 16, "options": {"width": 4}, "num_classes": 3, "lr": 0.05}


def evaluated(trainer, experts, coded, tasks_of):
    evaluator = DecodingEvaluator(experts, coded)
    trainer.test(evaluator, datamodule=tasks_of([3, 2]), verbose=False)
    return evaluator


@pytest.fixture
def product_precision():
    before = torch.get_float32_matmul_precision()
    yield before
    torch.set_float32_matmul_precision(before)


def test_networks_are_evaluated_in_bf16_and_decoded_in_full(make_trainer, write_experts, write_coded, tasks_of):
    passes = []
    experts = write_experts([3, 2])  # which runs the networks, and so comes before the hook
    coded = write_coded([[0.5, 0.5]], experts)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: passes.append(output.dtype) if isinstance(module, nn.Linear) else None
    )
    try:
        mixed = evaluated(make_trainer(precision="bf16-mixed"), experts, coded, tasks_of)
    finally:
        hook.remove()
    assert passes[:2] == [torch.float32] * 2, "the heads of the two experts are checked in full"
    assert set(passes[2:]) == {torch.bfloat16}, "the calibration samples' answers too"
    full = evaluated(make_trainer(), experts, coded, tasks_of)
    rough, exact = ([outcome.columns["residual"] for outcome in each.measurements] for each in (mixed, full))
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.05, nan_ok=True)
    oracle = [each.columns["agreement"] for each in mixed.measurements if each.columns["method"] == "oracle"]
    assert set(oracle) == {1}
    # The decoders' own arithmetic: with 8 bits of mantissa the ridge's solution would be far off.
    decoders = [[outcome.columns["decoder"] for outcome in each.measurements] for each in (mixed, full)]
    assert decoders[0] == decoders[1]
    assert set(decoders[0]) == {str(kind) for kind in DecoderKind}


@pytest.mark.usefixtures("product_precision")
def test_decoding_is_in_full_precision_whatever_products_are(
    make_trainer, write_experts, write_coded, tasks_of, monkeypatch
):
    experts = write_experts([3, 2])
    coded, seen, update = write_coded([[0.5, 0.5]], experts), set(), DecodingAccuracy.update
    monkeypatch.setattr(DecodingAccuracy, "update", lambda *a: seen.add(multiplies_in_bfloat16()) or update(*a))
    evaluated(make_trainer(matmul_precision="medium"), experts, coded, tasks_of)
    assert torch.get_float32_matmul_precision() == "medium"
    assert multiplies_in_bfloat16()
    assert seen == {False}


def test_torch_s_newer_settings_of_precision_are_taken_and_left():
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this torch has the older settings alone")
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = products.fp32_precision, convolutions.fp32_precision
    try:
        products.fp32_precision, convolutions.fp32_precision = "tf32", "ieee"  # torch then refuses the older ones
        network = nn.Linear(3, 2)
        assert coin.fisher_diagonal(network, [torch.ones(2, 3)])["bias"].tolist() == [1, 1]
        inputs = [[torch.randn(5, 3)]] * 2
        assert len(coin.merge_networks(coin.HeadFit(), [network, network], coin.uniform(2), calibration=inputs))
        assert (products.fp32_precision, convolutions.fp32_precision) == ("tf32", "ieee")
    finally:
        products.fp32_precision, convolutions.fp32_precision = before


def test_distillation_in_bf16_has_losses_in_full(make_trainer, write_experts, tasks_of):
    source = ExpertFiles({task: Path(path) for task, path in write_experts([3, 2]).items()})
    tasks = tasks_of([3, 2])
    tasks.setup()
    module = DistillationModule(source.empty_model().eval(), [*source.each_network()], [0.5, 0.5], lr=1e-3, steps=4)
    trainer = make_trainer(precision="bf16-mixed", max_steps=4, max_epochs=-1)
    trainer.fit(module, Batches(tasks.calibration(), 8, trainer, 0, Augmentation.none))
    loss = trainer.callback_metrics["train/loss"]
    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert {parameter.dtype for parameter in module.student.parameters()} == {torch.float32}


def test_an_expert_trained_in_bf16_is_exported_with_its_full_fisher(tmp_path, make_trainer, synthetic):
    for name, options in {"full": {}, "mixed": {"precision": "bf16-mixed"}}.items():
        callbacks = [ExpertExport(str(tmp_path / name)), FisherEstimator(20, path=str(tmp_path / f"{name}.fisher"))]
        make_trainer(max_epochs=1, callbacks=callbacks, **options).fit(Expert(**SMALL), datamodule=synthetic())
    mixed, full = (load_network(tmp_path / name).network.state_dict() for name in ("mixed", "full"))
    assert any(not mixed[name].equal(full[name]) for name in full)
    values = open_statistic(tmp_path / "mixed.fisher", statistic="fisher")
    assert all(value.dtype == torch.float32 for value in values.values())


def test_precisions_are_options_of_the_trainer(make_trainer, product_precision):
    for options in ({"matmul_precision": "high"}, {}):
        make_trainer(**options)
        assert torch.get_float32_matmul_precision() == "high"
    for each in ("bf16", "16"):
        with pytest.raises(ConfigurationError, match=f"found precision '{each}-true'.*; use {each}-mixed"):
            make_trainer(precision=f"{each}-true")
