"""The LightningModule of an expert: what it trains, logs and saves, and the options it takes and refuses."""

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
WITH_DROPOUT = {"network": "timm/test_vit", "image_size": 32, "options": {"drop_rate": 0.5}}
HEAD = {"fc.weight", "fc.bias"}


@pytest.fixture
def fit(synthetic, make_trainer):
    """Return a function that trains an expert for an epoch, and returns it."""

    def run(callbacks=(), trainer=(), **options):
        expert = Expert(**{**SMALL, "lr": 0.05, **options})
        trainer = make_trainer(callbacks=[*callbacks], **{"max_epochs": 1, **dict(trainer)})
        trainer.fit(expert, datamodule=synthetic())
        return expert

    return run


class Noted(Callback):
    """Keeps what a function returns before each training step."""

    def __init__(self, function):
        self.function = function
        self.found = []

    def on_train_batch_start(self, trainer, *_):
        self.found.append(self.function(trainer))


def noted_rates():
    return Noted(lambda trainer: trainer.optimizers[0].param_groups[0]["lr"])


def assert_equal(found, expected):
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


def logits_of(expert, split):
    images, labels = split[:]
    with torch.no_grad():
        return expert.eval()(to_input(images, 16)), labels


def test_an_expert_learns_a_tiny_task_and_its_checkpoint_loads(tmp_path, synthetic, fit):
    expert = fit(trainer={"max_epochs": 12}, weight_decay=0.0)
    logits, labels = logits_of(expert, synthetic().splits.train)
    assert torch.equal(logits.argmax(1), labels)
    expert.trainer.save_checkpoint(tmp_path / "expert.ckpt")
    loaded = Expert.load_from_checkpoint(tmp_path / "expert.ckpt", weights_only=True)
    assert dict(loaded.hparams) == dict(expert.hparams)
    assert_equal(loaded.network.state_dict(), expert.network.state_dict())


def test_logged_numbers_and_predictions_are_those_of_the_whole_test_set(synthetic, make_trainer):
    expert = Expert(**OF_THREE)
    task = synthetic(test=23)
    (logged,) = make_trainer().test(expert, datamodule=task, verbose=False)
    logits, labels = logits_of(expert, task.splits.test)
    accuracy = float((logits.argmax(1) == labels).double().mean())
    loss = float(F.cross_entropy(logits, labels))
    assert logged["test/accuracy"] == pytest.approx(accuracy, abs=1e-7)
    assert logged["test/loss"] == pytest.approx(loss, rel=1e-5)
    found = torch.cat(make_trainer().predict(expert, datamodule=task))
    torch.testing.assert_close(found, logits.softmax(1))


REFUSED = {
    "found lr=0.0, expected a number above 0": {"lr": 0.0},
    "found optimizer torch.optim.SGD .*: Invalid weight_decay value: -1.0": {"weight_decay": -1.0},
    "found optimizer 'torch.optim.Adm', .*has no attribute 'Adm'": {"optimizer": "Adm"},
    "found optimizer=<class .*, expected the name of a class of torch.optim": {
        "optimizer": nn.Linear
    },
    "unexpected keyword .*'rho'": {"optimizer": {"class_path": "AdamW", "init_args": {"rho": 0.9}}},
    "torch.optim.lr_scheduler.StepLR .*missing 1 required .*: 'step_size'": {
        "lr_scheduler": "StepLR"
    },
    "Unknown model small_resnett; change network.name": {"network": "small_resnett"},
    "found num_classes=0": {"num_classes": 0},
    "found trainable pattern 'layer4.*stages": {"trainable": ["head", "layer4*"]},
    "found trainable pattern 'fc.wieght'.*the nearest names are fc.weight": {
        "trainable": ["fc.wieght"]
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_options_are_refused_at_construction(message):
    with pytest.raises(ConfigurationError, match=message):
        Expert(**(OF_THREE | REFUSED[message]))


NO_LOGITS = {
    "tuple": lambda logits: (logits, logits),
    r"torch.Size\(\[4, 2\]\)": lambda logits: logits[:, :2],
}


@pytest.mark.parametrize("found", NO_LOGITS)
def test_a_network_that_returns_no_logits_is_refused_at_the_first_batch(
    found, synthetic, make_trainer
):
    expert = Expert(**OF_THREE)
    expert.network.register_forward_hook(lambda _, __, logits: NO_LOGITS[found](logits))
    message = f"found {found} from the network 'small_resnet', expected logits"
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(max_epochs=1).fit(
            expert, datamodule=synthetic(batch_size=4, eval_batch_size=4)
        )


def test_the_task_and_the_network_must_have_equally_many_classes(fit, synthetic, make_trainer):
    message = "found num_classes=4 of the model and 3 of the data"
    with pytest.raises(ConfigurationError, match=message):
        fit(num_classes=4)
    loader = synthetic().train_dataloader()
    with pytest.raises(ConfigurationError, match="found no num_classes and no datamodule"):
        make_trainer(max_epochs=1).fit(Expert(**SMALL), loader)


# The first and the last rate, and the largest, of a run of ten steps.
SCHEDULES = {
    "none": (None, 0.1, 0.1, 0.1),
    "its length": ("CosineAnnealingLR", 0.1, 0.00245, 0.1),
    "a longer one": (
        {"class_path": "CosineAnnealingLR", "init_args": {"T_max": 1000}},
        0.1,
        0.1,
        0.1,
    ),
    "one cycle": ("coin.modules.recipe.OneCycle", 0.004, 4e-7, 0.1),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_spans_all_steps_unless_it_is_told_otherwise(name, fit):
    schedule, *expected = SCHEDULES[name]
    rates = noted_rates()
    fit([rates], trainer={"max_epochs": None, "max_steps": 10}, lr=0.1, lr_scheduler=schedule)
    found = [rates.found[0], rates.found[-1], max(rates.found)]
    assert found == pytest.approx(expected, rel=0.06)


def test_a_schedule_of_a_run_without_an_end_is_refused(fit):
    endless = {"max_epochs": -1, "max_time": "00:00:00:01"}
    for schedule in ("OneCycleLR", "CosineAnnealingLR"):
        message = f"found lr_scheduler=.*{schedule} for a run .*; set trainer.max_ep"
        with pytest.raises(ConfigurationError, match=message):
            fit(trainer=endless, lr_scheduler=schedule)
    rates = noted_rates()
    fit([rates], trainer=endless, lr_scheduler=None)
    assert set(rates.found) == {0.05}


OPTIMISERS = {
    "the default": ({}, {"lr": 0.01, "weight_decay": 5e-4, "momentum": 0.9}),
    "other rates": (
        {"lr": 0.02, "weight_decay": 0.03},
        {"lr": 0.02, "weight_decay": 0.03, "momentum": 0.9},
    ),
    "by name": ({"optimizer": "AdamW", "lr": 0.02}, {"lr": 0.02, "weight_decay": 0.01}),
    "by path": ({"optimizer": "torch.optim.RMSprop"}, {"lr": 0.01, "alpha": 0.99}),
    "with options": (
        {"optimizer": {"class_path": "Adam", "init_args": {"lr": 1e-4, "eps": 1e-3}}},
        {"lr": 1e-4, "eps": 1e-3},
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_optimiser_gets_its_options(name):
    options, expected = OPTIMISERS[name]
    expert = Expert(**OF_THREE, **options)
    optimizer = expert.recipe.make_optimizer(expert.network.parameters())
    assert expected.items() <= optimizer.param_groups[0].items()


def test_experts_start_from_the_base_checkpoint(write_experts):
    base = write_experts([3])["task0"]
    expert = Expert(**OF_THREE, initial=base)
    assert_equal(expert.network.state_dict(), load_network(Path(base)).network.state_dict())


class Stop(Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            raise KeyError("killed")


def test_a_run_killed_and_resumed_equals_an_undisturbed_one(tmp_path, synthetic, make_trainer):
    task = synthetic(train=20, image_size=32, augmentation="crop", seed=4)

    def train(folder, *callbacks, ckpt_path=None, seed=0):
        torch.manual_seed(len(folder))  # nothing may hang on the global generator's state
        saver = ModelCheckpoint(tmp_path / folder, save_last=True)
        options = {"max_epochs": 3, "enable_checkpointing": True}
        trainer = make_trainer(callbacks=[saver, *callbacks], **options)
        expert = Expert(**WITH_DROPOUT, lr=0.05, seed=seed)
        trainer.fit(expert, datamodule=task, ckpt_path=ckpt_path)
        return expert.network.state_dict()

    undisturbed = train("undisturbed")
    with pytest.raises(KeyError, match="killed"):
        train("resumed", Stop())
    resumed = train("resumed", ckpt_path=tmp_path / "resumed/last.ckpt")
    assert_equal(resumed, undisturbed)
    other = train("other", seed=1)  # by which dropout is drawn
    assert not torch.equal(other["head.weight"], undisturbed["head.weight"])


def test_dropout_is_drawn_anew_in_every_epoch_and_for_every_seed(fit):
    seeds = Noted(lambda trainer: torch.initial_seed())
    for seed in (0, 1):
        fit([seeds], trainer={"max_epochs": 3}, seed=seed)
    assert len(set(seeds.found)) == 6


@pytest.fixture
def fine_tuned(fit):
    """Return a function that trains for one epoch and returns the expert and the names of what changed."""

    def run(callbacks=(), **options):
        own = {**OF_THREE, "lr": 0.05, "weight_decay": 0.0, **options}
        before = Expert(**own).network.state_dict()
        expert = fit(callbacks, trainer={"val_check_interval": 2, "num_sanity_val_steps": 1}, **own)
        after = expert.network.state_dict()
        return expert, {name for name in after if not torch.equal(after[name], before[name])}

    return run


@pytest.mark.parametrize("freeze", [False, True])
def test_everything_is_trained_but_the_statistics_of_frozen_batchnorm(freeze, fine_tuned):
    expert, changed = fine_tuned(freeze_batchnorm=freeze)
    parameters = {name for name, _ in expert.network.named_parameters()}
    statistics = {name for name, _ in expert.network.named_buffers()}
    assert changed == (parameters if freeze else parameters | statistics)
    expert.train()
    modes = {type(module): module.training for module in expert.network.modules()}
    assert modes[nn.BatchNorm2d] != freeze
    assert modes[nn.Conv2d]


def test_batchnorm_is_frozen_too_where_the_network_is_built_when_training_starts(fit):
    expert = fit(freeze_batchnorm=True)
    state = expert.network.state_dict()
    means = [tensor for name, tensor in state.items() if name.endswith("running_mean")]
    assert not torch.cat(means).any()


STAGE = {"stages.3.1.conv1.weight", "stages.3.1.conv2.weight"}
PATTERNS = {
    "the head": (["head"], HEAD),
    "two": (["head", "stages.3.1.conv?.weight"], HEAD | STAGE),
    "a layer": (["stem.*"], {"stem.0.weight", "stem.1.weight", "stem.1.bias"}),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_only_what_matches_is_trained(name, fine_tuned):
    patterns, expected = PATTERNS[name]
    expert, changed = fine_tuned(trainable=patterns)
    parameters = dict(expert.network.named_parameters())
    assert changed & parameters.keys() == expected
    assert {each for each, parameter in parameters.items() if parameter.requires_grad} == expected


def test_the_head_is_meant_whatever_it_is_called():
    network = build_network(NetworkConfig("small_vit", 16, None, {"depth": 1}), 3)
    assert trainable_names(network, ["head"]) == ["heads.head.weight", "heads.head.bias"]


def test_a_head_that_is_trained_alone_has_a_fisher_of_all_parameters(tmp_path, fine_tuned):
    expert, _ = fine_tuned([FisherEstimator(samples_per_task=8)], trainable=["head"])
    fisher = open_statistic(tmp_path / "run/expert.fisher.safetensors", statistic="fisher")
    assert fisher.keys() == dict(expert.network.named_parameters()).keys()
