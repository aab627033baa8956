"""What is fine-tuned, how fast, and how far from the shared initialisation."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW

from coin.callbacks import FisherEstimator
from coin.errors import ConfigurationError
from coin.modules import Expert
from coin.networks import NetworkConfig, build_network
from coin.networks.recipe import OneCycle, squared_distance, trainable_names
from coin.statistics.files import open_statistic

SMALL = {"network": "small_resnet", "image_size": 16, "options": {"width": 4}, "num_classes": 3}
HEAD = {"fc.weight", "fc.bias"}


def changed_by(expert, before):
    return {name for name, tensor in expert.network.state_dict().items() if not torch.equal(tensor, before[name])}


def trained(make_trainer, task, **options):
    """Train for one epoch, with a validation in it, and return the expert and the names of what has changed."""
    expert = Expert(**{**SMALL, "lr": 0.05, "weight_decay": 0.0, **options})
    before = {name: tensor.clone() for name, tensor in expert.network.state_dict().items()}
    trainer = make_trainer(max_epochs=1, val_check_interval=2, num_sanity_val_steps=1)
    trainer.fit(expert, datamodule=task)
    return expert, changed_by(expert, before), trainer


def statistics_of(network):
    return {name for name, _ in network.named_buffers()}


def test_frozen_batchnorm_trains_its_weights_and_keeps_its_statistics(synthetic, make_trainer):
    expert, changed, _ = trained(make_trainer, synthetic(), freeze_batchnorm=True)
    assert changed == {name for name, _ in expert.network.named_parameters()}
    expert.train()
    modes = {type(module): module.training for module in expert.network.modules()}
    assert not modes[nn.BatchNorm2d]
    assert modes[nn.Conv2d]
    _, changed, _ = trained(make_trainer, synthetic())
    assert statistics_of(expert.network) <= changed


def test_it_is_frozen_in_a_network_that_is_built_when_training_starts(synthetic, make_trainer):
    expert = Expert(**{**SMALL, "num_classes": None}, freeze_batchnorm=True)
    make_trainer(max_epochs=1).fit(expert, datamodule=synthetic())
    means = [each for name, each in expert.network.named_buffers() if name.endswith("running_mean")]
    assert all((mean == 0).all() for mean in means)


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["head"], HEAD),
        (["head", "stages.3.1.conv?.weight"], HEAD | {"stages.3.1.conv1.weight", "stages.3.1.conv2.weight"}),
        (["stem.*"], {"stem.0.weight", "stem.1.weight", "stem.1.bias"}),
    ],
)
def test_only_what_matches_is_trained(synthetic, make_trainer, patterns, wanted):
    expert, changed, trainer = trained(make_trainer, synthetic(), trainable=patterns)
    assert changed - statistics_of(expert.network) == wanted
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


def test_the_penalty_is_that_of_the_formula(synthetic):
    expert, task = Expert(**SMALL, l2_sp=0.3, trainable=["head", "stages.*"]).double().eval(), synthetic()
    start = {name: each.detach().clone() for name, each in expert.network.named_parameters()}
    with torch.no_grad():
        for each in expert.network.parameters():
            each += torch.randn(each.shape, generator=torch.Generator().manual_seed(1), dtype=each.dtype)
    images, labels = task.on_after_batch_transfer(next(iter(task.train_dataloader())), 0)
    images = images.double()
    expert.log = lambda *args, **kwargs: None
    expert.training_step((images, labels), 0).backward()
    found = {name: each.grad for name, each in expert.network.named_parameters() if each.grad is not None}
    expert.zero_grad()
    F.cross_entropy(expert(images), labels).backward()
    assert found.keys() == set(trainable_names(expert.network, ["head", "stages.*"]))
    for name, each in expert.network.named_parameters():
        if name in found:
            pull = 0.0 if name in HEAD else 0.3 * (each.detach() - start[name])
            torch.testing.assert_close(found[name], each.grad + pull)


def test_the_distance_is_summed_over_what_has_a_start():
    moved = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(9.0)}
    assert squared_distance(moved, {"a": torch.tensor([0.0, 4.0])}) == 5


class Stop(Callback):
    """Kills the run when its second epoch starts."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            raise KeyError("killed")


def test_a_resumed_training_is_drawn_to_the_start_it_began_with(tmp_path, synthetic, make_trainer, write_experts):
    first, second = (Path(path) for path in write_experts([3, 3]).values())
    base = tmp_path / "base.safetensors"

    def run(folder, callbacks=(), ckpt_path=None):
        saver = ModelCheckpoint(tmp_path / folder, save_last=True)
        trainer = make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[saver, *callbacks])
        expert = Expert(
            **SMALL, initial=str(base), l2_sp=0.5, head_lr=0.02, freeze_batchnorm=True, lr_scheduler="CosineAnnealingLR"
        )
        trainer.fit(expert, datamodule=synthetic(), ckpt_path=ckpt_path)
        return expert.network.state_dict()

    base.write_bytes(first.read_bytes())
    undisturbed = run("undisturbed")
    with pytest.raises(KeyError, match="killed"):
        run("resumed", [Stop()])
    base.write_bytes(second.read_bytes())  # by now it is another's
    resumed = run("resumed", ckpt_path=tmp_path / "resumed/last.ckpt")
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)


class Rates(Callback):
    """Records the learning rates of every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *args):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.parametrize("schedule", [None, "CosineAnnealingLR", OneCycle])
@pytest.mark.parametrize("optimizer", ["SGD", partial(AdamW, betas=(0.5, 0.9))])
def test_the_schedule_scales_the_heads_own_rate_as_well(synthetic, make_trainer, schedule, optimizer):
    rates = Rates()
    trainer = make_trainer(max_epochs=2, callbacks=[rates])
    expert = Expert(**SMALL, lr=0.01, head_lr=0.05, lr_scheduler=schedule, optimizer=optimizer)
    trainer.fit(expert, datamodule=synthetic(train=40))
    body, head = trainer.optimizers[0].param_groups
    peak = {None: "lr", OneCycle: "max_lr"}.get(schedule, "initial_lr")
    assert len(rates.seen) == 8
    for own, heads in rates.seen[:-1]:
        assert heads == pytest.approx(5 * own)
    assert (body[peak], head[peak]) == (0.01, 0.05)
    names = {id(each): name for name, each in expert.network.named_parameters()}
    assert {names[id(each)] for each in head["params"]} == HEAD
    assert {names[id(each)] for each in body["params"]} == set(names.values()) - HEAD


def test_a_head_alone_may_have_a_rate_of_its_own(synthetic, make_trainer):
    _, _, trainer = trained(make_trainer, synthetic(), trainable=["head"], head_lr=0.03, lr_scheduler=None)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.03]
    with pytest.raises(ConfigurationError, match=r"found head_lr=0\.1 and a head that is not trained; add 'head'"):
        Expert(**SMALL, trainable=["stem.*"], head_lr=0.1)


def test_a_head_alone_has_a_fisher_of_all_parameters(tmp_path, synthetic, make_trainer):
    expert = Expert(**SMALL, trainable=["head"])
    make_trainer(max_epochs=1, callbacks=[FisherEstimator(samples_per_task=8)]).fit(expert, datamodule=synthetic())
    fisher = open_statistic(tmp_path / "run/expert.fisher.safetensors", statistic="fisher").values
    assert fisher.keys() == dict(expert.network.named_parameters()).keys()
    assert {name for name, each in expert.network.named_parameters() if each.requires_grad} == HEAD
