from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from coin.callbacks import FisherEstimator
from coin.data import to_input
from coin.errors import ConfigurationError
from coin.modules import Expert
from coin.modules.recipe import trainable_names
from coin.networks import NetworkConfig, build_network, load_network
from coin.statistics.files import open_statistic

SMALL = {"network": "small_resnet", "image_size": 16, "options": {"width": 4}}
OF_THREE = {**SMALL, "num_classes": 3}
HEAD = {"fc.weight", "fc.bias"}
WITH_DROPOUT = {"network": "timm/test_vit", "image_size": 32, "options": {"drop_rate": 0.5}}


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *args):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class Stop(Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            raise KeyError("killed")


def logits_of(expert, split):
    with torch.no_grad():
        images, labels = split[:]
        return expert.eval()(to_input(images, 16)), labels


def test_an_expert_overfits_a_tiny_task_and_its_checkpoint_loads_with_weights_only(tmp_path, synthetic, make_trainer):
    expert, trainer = Expert(**SMALL, lr=0.05, weight_decay=0.0), make_trainer(max_epochs=12)
    trainer.fit(expert, datamodule=synthetic())
    logits, labels = logits_of(expert, synthetic().splits.train)
    assert torch.equal(logits.argmax(1), labels)
    trainer.save_checkpoint(tmp_path / "expert.ckpt")
    loaded = Expert.load_from_checkpoint(tmp_path / "expert.ckpt", weights_only=True)
    state = expert.network.state_dict()
    assert loaded.hparams["num_classes"] == 3
    assert state.keys() == loaded.network.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.network.state_dict().items())
    assert dict(loaded.hparams) == dict(expert.hparams)


def test_logged_numbers_and_predictions_are_those_of_the_whole_test_set(synthetic, make_trainer):
    expert, task = Expert(**SMALL, num_classes=3), synthetic(test=23)
    (logged,) = make_trainer().test(expert, datamodule=task, verbose=False)
    logits, labels = logits_of(expert, task.splits.test)
    assert logged["test/accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()), abs=1e-7)
    assert logged["test/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    found = torch.cat(make_trainer().predict(expert, datamodule=task))
    torch.testing.assert_close(found, logits.softmax(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "found lr=0.0, expected a number above 0"),
        ({"lr": float("nan")}, "found lr=nan"),
        ({"weight_decay": -1.0}, "found optimizer torch.optim.SGD .*: Invalid weight_decay value: -1.0"),
        ({"optimizer": "Adm"}, "found optimizer 'torch.optim.Adm', .*module 'torch.optim' has no attribute 'Adm'"),
        ({"optimizer": torch.nn.Linear}, "found optimizer=<class .*, expected the name of a class of torch.optim"),
        ({"optimizer": {"class_path": "AdamW", "init_args": {"momentum": 0.9}}}, "unexpected keyword .*'momentum'"),
        ({"lr_scheduler": "StepLR"}, "torch.optim.lr_scheduler.StepLR .*missing 1 required .*: 'step_size'"),
        ({"network": "small_resnett"}, "Unknown model small_resnett; change network.name"),
        ({"num_classes": 0}, "found 0 classes"),
    ],
)
def test_bad_options_are_refused_at_construction(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Expert(**{**SMALL, "num_classes": 3, **options})


@pytest.mark.parametrize(
    ("made", "found"), [(lambda x: (x, x), "tuple"), (lambda x: x[:, :2], r"torch.Size\(\[4, 2\]\)")]
)
def test_a_network_that_returns_no_logits_is_refused_at_the_first_batch(made, found, synthetic, make_trainer):
    expert = Expert(**SMALL, num_classes=3)
    expert.network.register_forward_hook(lambda module, inputs, logits: made(logits))
    with pytest.raises(ConfigurationError, match=f"found {found} from the network 'small_resnet', expected logits"):
        make_trainer(max_epochs=1).fit(expert, datamodule=synthetic(batch_size=4, eval_batch_size=4))


def test_the_task_and_the_network_must_have_equally_many_classes(synthetic, make_trainer):
    with pytest.raises(ConfigurationError, match="found num_classes=4 of the model and 3 of the data"):
        make_trainer(max_epochs=1).fit(Expert(**SMALL, num_classes=4), datamodule=synthetic(classes=3))
    with pytest.raises(ConfigurationError, match="found no num_classes and no datamodule"):
        make_trainer(max_epochs=1).fit(Expert(**SMALL), synthetic().train_dataloader())


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (None, lambda lr: lr == [0.1] * 8),
        ("CosineAnnealingLR", lambda lr: lr[0] == 0.1 and sorted(lr, reverse=True) == lr and lr[-1] < 0.005),
        ({"class_path": "CosineAnnealingLR", "init_args": {"T_max": 1000}}, lambda lr: lr[-1] > 0.09),
        ("coin.modules.recipe.OneCycle", lambda lr: lr[0] < max(lr) and lr[-1] < 1e-4 and 0.09 < max(lr) <= 0.1),
    ],
)
@pytest.mark.parametrize("optimizer", ["SGD", {"class_path": "AdamW", "init_args": {"betas": (0.5, 0.9)}}])
def test_the_schedule_spans_all_steps(synthetic, make_trainer, schedule, rates, optimizer):
    recorder = Rates()
    trainer = make_trainer(max_epochs=2, callbacks=[recorder])
    trainer.fit(Expert(**SMALL, lr=0.1, lr_scheduler=schedule, optimizer=optimizer), datamodule=synthetic(train=40))
    assert rates([rate for (rate,) in recorder.seen])


SGD = {"lr": 0.02, "weight_decay": 0.03}


@pytest.mark.parametrize(
    ("options", "kind", "found"),
    [
        (SGD, "SGD", {**SGD, "momentum": 0.9}),
        ({}, "SGD", {"lr": 0.01, "weight_decay": 5e-4, "momentum": 0.9}),
        ({"optimizer": "AdamW", "lr": 0.02}, "AdamW", {"lr": 0.02, "weight_decay": 0.01}),
        ({"optimizer": {"class_path": "Adam", "init_args": {"lr": 1e-4}}}, "Adam", {"lr": 1e-4, "weight_decay": 0}),
        ({"optimizer": "torch.optim.RMSprop"}, "RMSprop", {"lr": 0.01, "momentum": 0}),
    ],
)
def test_the_optimiser_gets_its_options(synthetic, make_trainer, options, kind, found):
    trainer = make_trainer(max_steps=1, max_epochs=1)
    trainer.fit(Expert(**SMALL, **options, lr_scheduler=None), datamodule=synthetic())
    (group,) = trainer.optimizers[0].param_groups
    assert type(trainer.optimizers[0]).__name__ == kind
    assert {name: group[name] for name in found} == found


@pytest.mark.parametrize("schedule", ["OneCycleLR", "CosineAnnealingLR", None])
def test_a_schedule_of_a_run_without_an_end_is_refused(synthetic, make_trainer, schedule):
    rates = Rates()
    trainer = make_trainer(max_epochs=-1, max_time="00:00:00:01", callbacks=[rates])
    expert = Expert(**SMALL, lr_scheduler=schedule, lr=0.02)
    if schedule is None:
        trainer.fit(expert, datamodule=synthetic())
        assert len(rates.seen) > 1
        assert all(rate == [0.02] for rate in rates.seen)
        return
    with pytest.raises(ConfigurationError, match=f"found lr_scheduler=.*{schedule} for a run .*; set trainer.max_ep"):
        trainer.fit(expert, datamodule=synthetic())


def test_experts_start_from_the_base_checkpoint(write_experts):
    base = write_experts([3])["task0"]
    wanted = load_network(Path(base)).network.state_dict()
    found = Expert(**SMALL, initial=base, num_classes=3).network.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.fixture
def trained(tmp_path, synthetic, make_trainer):
    """Return a function that trains with checkpoints in a folder and returns the network's state."""

    def run(folder, *callbacks, epochs=3, ckpt_path=None, task=None, **options):
        torch.manual_seed(len(folder))  # nothing may hang on the global generator's state
        saver = ModelCheckpoint(tmp_path / folder, save_last=True)
        trainer = make_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[saver, *callbacks])
        expert = Expert(**{**SMALL, "lr": 0.05, **options})
        trainer.fit(expert, datamodule=task or synthetic(train=20), ckpt_path=ckpt_path)
        return expert.network.state_dict()

    return run


@pytest.mark.parametrize("network", [SMALL, WITH_DROPOUT], ids=["small_resnet", "vit"])
def test_a_run_killed_and_resumed_equals_an_undisturbed_one(tmp_path, synthetic, trained, network):
    def task():
        size = network["image_size"]
        return synthetic(train=20, image_size=size, augmentation="crop", seed=4)

    undisturbed = trained("undisturbed", task=task(), **network)
    with pytest.raises(KeyError, match="killed"):
        trained("resumed", Stop(), task=task(), **network)
    resumed = trained("resumed", ckpt_path=tmp_path / "resumed" / "last.ckpt", task=task(), **network)
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    # Dropout follows the seed, so the comparison above has something to find.
    other = trained("other", task=task(), seed=1, **network)
    assert any(not torch.equal(undisturbed[name], other[name]) for name in other) == ("drop_rate" in network["options"])


@pytest.fixture
def fine_tuned(make_trainer, synthetic):
    """Return a function that trains for one epoch and returns the expert, the names of what changed, the Trainer."""

    def run(callbacks=(), **options):
        expert = Expert(**{**OF_THREE, "lr": 0.05, "weight_decay": 0.0, **options})
        before = {name: tensor.clone() for name, tensor in expert.network.state_dict().items()}
        trainer = make_trainer(max_epochs=1, val_check_interval=2, num_sanity_val_steps=1, callbacks=[*callbacks])
        trainer.fit(expert, datamodule=synthetic())
        after = expert.network.state_dict()
        return expert, {name for name in after if not torch.equal(after[name], before[name])}, trainer

    return run


def test_everything_is_trained_but_the_statistics_of_frozen_batchnorm(fine_tuned, synthetic, make_trainer):
    expert, changed, _ = fine_tuned()
    assert changed == expert.network.state_dict().keys()
    expert, changed, _ = fine_tuned(freeze_batchnorm=True)
    assert changed == {name for name, _ in expert.network.named_parameters()}
    expert.train()
    modes = {type(module): module.training for module in expert.network.modules()}
    assert not modes[nn.BatchNorm2d]
    assert modes[nn.Conv2d]
    late = Expert(**SMALL, freeze_batchnorm=True)  # which is built when training starts
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
def test_only_what_matches_is_trained(fine_tuned, patterns, wanted):
    expert, changed, trainer = fine_tuned(trainable=patterns)
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
        Expert(**OF_THREE, trainable=["head", pattern])
    assert pattern in str(caught.value)
    assert nearest in str(caught.value)


def test_a_head_that_is_trained_alone_has_a_fisher_of_all_parameters(tmp_path, fine_tuned):
    expert, _, _ = fine_tuned([FisherEstimator(samples_per_task=8)], trainable=["head"])
    fisher = open_statistic(tmp_path / "run/expert.fisher.safetensors", statistic="fisher")
    assert fisher.keys() == dict(expert.network.named_parameters()).keys()
    assert {name for name, each in expert.network.named_parameters() if each.requires_grad} == HEAD
