"""Networks of timm: names, weights, heads, their own normalisation, and what the passes make of them."""

import sys
from copy import deepcopy

import pytest
import timm
import torch

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.errors import ConfigurationError, FileError
from coin.files.packaged import packaged_file
from coin.modules import Expert
from coin.networks import (
    NetworkConfig,
    build_network,
    features_and_logits,
    head_name,
    load_network,
    save_network,
)
from coin.networks.timm_networks import PACKAGED

LITE0 = "timm/tf_efficientnet_lite0"


def images(size=32, count=3):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def normalised(x, mean, std):
    return (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)


def usual(x):
    return normalised(x, IMAGENET_MEAN, IMAGENET_STD)


def answers(network, x):
    with torch.no_grad():
        return network(x)


@pytest.mark.parametrize(
    ("name", "size", "head"),
    [
        ("timm/test_resnet", 32, "fc"),
        ("timm/test_vit", 32, "head"),
        ("timm/test_efficientnet", 32, "classifier"),
        ("timm/test_convnext", 32, "head.fc"),
    ],
)
def test_families_of_timm_are_built_run_and_written(name, size, head, tmp_path):
    config = NetworkConfig(name, size)
    network = build_network(config, 5, seed=3).eval()
    assert head_name(network) == head
    x = usual(images(size))
    with torch.no_grad():
        features, logits = features_and_logits(network, x)
        torch.testing.assert_close(network.get_submodule(head)(features), logits)
    save_network(tmp_path / "expert.safetensors", network, config, 5, {})
    again = load_network(tmp_path / "expert.safetensors").network
    assert torch.equal(answers(again, x), logits)
    assert torch.equal(answers(deepcopy(network), x), logits)
    theirs = timm.create_model(name.removeprefix("timm/"), num_classes=5)
    assert network.state_dict().keys() == theirs.state_dict().keys()


def test_a_network_gets_its_own_normalisation():
    network = build_network(NetworkConfig(LITE0, 32), 4, seed=1).eval()
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=4).eval()
    plain.load_state_dict(network.state_dict())
    x = images()
    assert plain.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    torch.testing.assert_close(
        answers(network, usual(x)), answers(plain, normalised(x, [0.5] * 3, [0.5] * 3))
    )


def test_a_normalisation_that_is_given_takes_the_place_of_timms(tmp_path):
    config = NetworkConfig(LITE0, 32, mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD))
    network = build_network(config, 4, seed=1).eval()
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=4).eval()
    plain.load_state_dict(network.state_dict())
    x = usual(images())
    torch.testing.assert_close(answers(network, x), answers(plain, x))
    save_network(tmp_path / "expert.safetensors", network, config, 4, {})
    torch.testing.assert_close(
        answers(load_network(tmp_path / "expert.safetensors").network, x), answers(plain, x)
    )


def test_a_checkpoint_is_read_without_weights_and_keeps_their_normalisation():
    """It was that of the architecture's usual weights."""
    assert timm.get_pretrained_cfg("vit_small_patch16_224").mean == (0.5, 0.5, 0.5)
    expert = Expert("timm/vit_small_patch16_224", 224, weights="dino")
    again = Expert(**{**expert.hparams, "weights": None})
    assert again.config.source.normalisation == ([*IMAGENET_MEAN], [*IMAGENET_STD])


@pytest.mark.parametrize(
    "given",
    [{"mean": [0.5] * 3}, {"mean": [0.5], "std": [0.5]}, {"mean": [0.5] * 3, "std": [0, 1, 1]}],
)
def test_half_a_normalisation_is_refused(given):
    with pytest.raises(
        ConfigurationError, match="expected neither, or both: three numbers each, std above 0"
    ):
        NetworkConfig(LITE0, 32, **given)


@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_weights_are_timms_to_the_last_bit(name):
    weights, package, file = PACKAGED[name]
    whole = timm.create_model(name).eval()
    theirs = torch.load(packaged_file(package, file, extra="timm"), weights_only=True)
    whole.load_state_dict(dict(zip(whole.state_dict(), theirs.values(), strict=True)))
    network = build_network(NetworkConfig(f"timm/{name}", 32, weights), 7, seed=2).eval()
    x = normalised(images(), [0.5] * 3, [0.5] * 3)
    network._forward_pre_hooks.clear()
    with torch.no_grad():
        assert torch.equal(network.forward_features(x), whole.forward_features(x))
    assert network.classifier.weight.shape == (7, 1280)
    assert not network.classifier.bias.any()
    other = build_network(NetworkConfig(f"timm/{name}", 32, weights), 7, seed=3)
    assert not torch.equal(other.classifier.weight, network.classifier.weight)


def test_weights_that_cannot_be_had_say_what_to_do(monkeypatch):
    with pytest.raises(
        FileError, match=r"cannot get the weights a1_in1k of timm/resnet50 .*HF_HOME"
    ):
        build_network(NetworkConfig("timm/resnet50", 32, "a1_in1k"), 3)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ConfigurationError, match=r"found no package timm.*pip install '\.\[timm\]'"
    ):
        build_network(NetworkConfig("timm/resnet50"), 3)
