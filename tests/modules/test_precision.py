"""Precisions: options of the Trainer, and what stays in full precision."""

import pytest
import torch
from torch import nn

import coin
from coin.callbacks import ExpertExport, FisherEstimator
from coin.errors import ConfigurationError
from coin.merging import HeadFit
from coin.modules import Expert
from coin.networks import load_network
from coin.statistics.files import open_statistic
from coin.trainer import Trainer

SMALL = {
    "network": "small_resnet",
    "image_size": 16,
    "options": {"width": 4},
    "num_classes": 3,
    "lr": 0.05,
}


def test_an_expert_trained_in_bf16_is_exported_with_its_full_fisher(
    tmp_path, make_trainer, synthetic
):
    weights = []
    for precision in ("32-true", "bf16-mixed"):
        path = tmp_path / precision
        fisher = tmp_path / f"{precision}.fisher"
        callbacks = [ExpertExport(str(path)), FisherEstimator(20, path=str(fisher))]
        trainer = make_trainer(max_epochs=1, callbacks=callbacks, precision=precision)
        trainer.fit(Expert(**SMALL), datamodule=synthetic())
        weights.append(load_network(path).network.fc.weight)
        values = open_statistic(fisher, statistic="fisher").values()
        assert {value.dtype for value in values} == {torch.float32}
    assert not torch.equal(*weights)


def test_torch_s_newer_settings_of_precision_are_taken_and_left():
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this torch has the older settings alone")
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [place.fp32_precision for place in places]
    try:
        for place, precision in zip(places, ("tf32", "ieee"), strict=True):
            place.fp32_precision = precision  # torch then refuses the older settings
        network = nn.Linear(3, 2)
        assert coin.fisher_diagonal(network, [torch.ones(2, 3)])["bias"].tolist() == [1, 1]
        inputs = [[torch.randn(5, 3)]] * 2
        coin.merge_networks(HeadFit(), [network, network], coin.uniform(2), calibration=inputs)
        assert [place.fp32_precision for place in places] == ["tf32", "ieee"]
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def test_the_precision_of_products_is_an_option_of_the_trainer(make_trainer):
    before = torch.get_float32_matmul_precision()
    try:
        for options in ({"matmul_precision": "high"}, {}):
            make_trainer(**options)
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["bf16", "16"])
def test_weights_in_16_bits_are_refused(precision, make_trainer):
    with pytest.raises(ConfigurationError, match=f"'{precision}-true'.*; use {precision}-mixed"):
        make_trainer(precision=f"{precision}-true")


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch):
    for name in ("CUDAAccelerator", "MPSAccelerator"):
        monkeypatch.setattr(f"lightning.pytorch.accelerators.{name}.is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=r"give --trainer\.accelerator=cpu"):
        Trainer(accelerator="gpu", devices=1, logger=False)
