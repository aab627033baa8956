"""Networks of timm: names, weights, heads, their own normalisation, and what the passes make of them."""

import pytest
import timm
import torch

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.files.packaged import packaged_file
from coin.modules import Expert
from coin.networks import (
    NetworkConfig,
    build_network,
    load_network,
    save_network,
)
from coin.networks.timm_networks import PACKAGED

HALF = [0.5] * 3


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def normalised(x, mean, std):
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@torch.no_grad()
def answers(network, x):
    return network.eval()(x)


@pytest.mark.parametrize(
    ("given", "mean", "std"),
    [
        ({}, HALF, HALF),  # timm's own
        ({"mean": [*IMAGENET_MEAN], "std": [*IMAGENET_STD]}, IMAGENET_MEAN, IMAGENET_STD),
    ],
)
def test_a_network_gets_its_own_normalisation_or_the_one_that_is_given(
    given, mean, std, images, tmp_path
):
    config = NetworkConfig("timm/tf_efficientnet_lite0", 32, **given)
    network = build_network(config, 4, seed=1)
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=4)
    plain.load_state_dict(network.state_dict())
    expected = answers(plain, normalised(images, mean, std))
    x = normalised(images, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(answers(network, x), expected)
    save_network(tmp_path / "expert.safetensors", network, config, 4, {})
    again = load_network(tmp_path / "expert.safetensors").network
    torch.testing.assert_close(answers(again, x), expected)


def test_a_checkpoint_is_read_without_weights_and_keeps_their_normalisation():
    """It was that of the architecture's usual weights."""
    assert timm.get_pretrained_cfg("vit_small_patch16_224").mean == (0.5, 0.5, 0.5)
    expert = Expert("timm/vit_small_patch16_224", 224, weights="dino")
    again = Expert(**{**expert.hparams, "weights": None})
    assert again.config.source.normalisation == ([*IMAGENET_MEAN], [*IMAGENET_STD])


@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_weights_are_timms_to_the_last_bit(name, images):
    weights, package, file = PACKAGED[name]
    whole = timm.create_model(name).eval()
    theirs = torch.load(packaged_file(package, file, extra="timm"), weights_only=True)
    whole.load_state_dict(dict(zip(whole.state_dict(), theirs.values(), strict=True)))
    config = NetworkConfig(f"timm/{name}", 32, weights)
    network = build_network(config, 7).eval()
    with torch.no_grad():
        assert torch.equal(network.forward_features(images), whole.forward_features(images))
    assert network.classifier.weight.shape == (7, 1280)
