"""What is fine-tuned, how fast, and how far from the shared initialisation."""

import pytest
import torch
from torch import nn

from coin.callbacks import FisherEstimator
from coin.errors import ConfigurationError
from coin.modules import Expert
from coin.modules.recipe import trainable_names
from coin.networks import NetworkConfig, build_network
from coin.statistics.files import open_statistic

SMALL = {"network": "small_resnet", "image_size": 16, "options": {"width": 4}, "num_classes": 3}
HEAD = {"fc.weight", "fc.bias"}


@pytest.fixture
def trained(make_trainer, synthetic):
    """Return a function that trains for one epoch and returns the expert, the names of what changed, the Trainer."""

    def run(callbacks=(), **options):
        expert = Expert(**{**SMALL, "lr": 0.05, "weight_decay": 0.0, **options})
        before = {name: tensor.clone() for name, tensor in expert.network.state_dict().items()}
        trainer = make_trainer(max_epochs=1, val_check_interval=2, num_sanity_val_steps=1, callbacks=[*callbacks])
        trainer.fit(expert, datamodule=synthetic())
        after = expert.network.state_dict()
        return expert, {name for name in after if not torch.equal(after[name], before[name])}, trainer

    return run


def test_everything_is_trained_but_the_statistics_of_frozen_batchnorm(trained, synthetic, make_trainer):
    expert, changed, _ = trained()
    assert changed == expert.network.state_dict().keys()
    expert, changed, _ = trained(freeze_batchnorm=True)
    assert changed == {name for name, _ in expert.network.named_parameters()}
    expert.train()
    modes = {type(module): module.training for module in expert.network.modules()}
    assert not modes[nn.BatchNorm2d]
    assert modes[nn.Conv2d]
    late = Expert(**{**SMALL, "num_classes": None}, freeze_batchnorm=True)  # which is built when training starts
    make_trainer(max_epochs=1).fit(late, datamodule=synthetic())
    assert all((mean == 0).all() for name, mean in late.network.named_buffers() if name.endswith("running_mean"))


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["head"], HEAD),
        (["head", "stages.3.1.conv?.weight"], HEAD | {"stages.3.1.conv1.weight", "stages.3.1.conv2.weight"}),
        (["stem.*"], {"stem.0.weight", "stem.1.weight", "stem.1.bias"}),
    ],
)
def test_only_what_matches_is_trained(trained, patterns, wanted):
    expert, changed, trainer = trained(trainable=patterns)
    assert changed - {name for name, _ in expert.network.named_buffers()} == wanted
    assert {name for name, each in expert.network.named_parameters() if each.requires_grad} == wanted
    assert sum(len(group["params"]) for group in trainer.optimizers[0].param_groups) == len(wanted)


def test_the_head_is_meant_whatever_it_is_called():
    network = build_network(NetworkConfig("small_vit", 16, None, {"depth": 1}), 3)
    assert trainable_names(network, ["head"]) == ["heads.head.weight", "heads.head.bias"]
    assert trainable_names(network, None) == [name for name, _ in network.named_parameters()]


@pytest.mark.parametrize(
    ("pattern", "nearest"), [("stages.3.2.*", "stages.3."), ("fc.wieght", "fc.weight"), ("layer4*", "stages.")]
)
def test_a_pattern_that_matches_nothing_is_told_with_the_nearest_names(pattern, nearest):
    with pytest.raises(ConfigurationError, match=r"^found trainable pattern '[^\n]*nearest names are") as caught:
        Expert(**SMALL, trainable=["head", pattern])
    assert pattern in str(caught.value)
    assert nearest in str(caught.value)


def test_a_head_that_is_trained_alone_has_a_fisher_of_all_parameters(tmp_path, trained):
    expert, _, _ = trained([FisherEstimator(samples_per_task=8)], trainable=["head"])
    fisher = open_statistic(tmp_path / "run/expert.fisher.safetensors", statistic="fisher")
    assert fisher.keys() == dict(expert.network.named_parameters()).keys()
    assert {name for name, each in expert.network.named_parameters() if each.requires_grad} == HEAD
