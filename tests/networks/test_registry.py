from urllib.error import URLError

import pytest
import torch
from torchvision import models

from coin.errors import ConfigurationError, FileError, StateError
from coin.networks import NetworkConfig, build_network, check_head, features_and_logits, fill_network, head_name

# One of every family that differs in its head or in how it is built: name, image size, the head, its inputs.
FAMILIES = [
    ("small_resnet", 32, "fc", 256),
    ("small_vit", 32, "heads.head", 128),
    ("resnet18", 32, "fc", 512),
    ("mobilenet_v2", 32, "classifier.1", 1280),
    ("mobilenet_v3_small", 32, "classifier.3", 1024),
    ("squeezenet1_1", 64, "classifier.1", 512),
    ("densenet121", 32, "classifier", 1024),
    ("vit_b_32", 32, "heads.head", 768),
    ("convnext_tiny", 32, "classifier.2", 768),
    ("swin_t", 32, "head", 768),
    ("googlenet", 64, "fc", 1024),
    ("efficientnet_b0", 32, "classifier.1", 1280),
    ("shufflenet_v2_x0_5", 32, "fc", 1024),
    ("mnasnet0_5", 32, "classifier.1", 1280),
    ("regnet_y_400mf", 32, "fc", 440),
    ("alexnet", 64, "classifier.6", 4096),
]


@pytest.mark.parametrize(("name", "size", "head", "width"), FAMILIES)
def test_every_family_has_a_head_of_the_wanted_classes_and_its_features(name, size, head, width):
    network = build_network(NetworkConfig(name, size), 7).eval()
    inputs = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, logits = features_and_logits(network, inputs)
        assert head_name(network) == head
        assert features.shape == (2, width)
        assert logits.shape == (2, 7)
        assert torch.equal(network(inputs), logits)
    if name.startswith("squeezenet"):  # which has a nonlinearity after its head
        with pytest.raises(StateError, match=r"the logits of SqueezeNet are not its head 'classifier.1' \(Conv2d\)"):
            check_head(network, features, logits)
    else:
        check_head(network, features, logits)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_no_auxiliary_logits_while_training(name):
    network = build_network(NetworkConfig(name, 96), 3).train()
    assert network(torch.zeros(2, 3, 96, 96)).shape == (2, 3)


def test_names_are_torchvisions_classifiers_and_our_own():
    for name in ("small_resnet", "resnet50", "vit_b_16", "maxvit_t", "regnet_y_128gf"):
        assert NetworkConfig(name).reads == "images"
    for name in ("fcn_resnet50", "maskrcnn_resnet50_fpn", "raft_small"):
        with pytest.raises(ConfigurationError, match=f"found network.name '{name}'"):
            NetworkConfig(name)


@pytest.mark.parametrize(
    ("arguments", "classes", "message"),
    [
        (("resnet5O",), 3, r"found network.name 'resnet5O' \(did you mean resnet50\?\)"),
        (("qqqqqqq",), 3, r"torchvision\.models\.list_models"),
        (("resnet50", 32, "IMAGENET1K_V3"), 3, "null, a file or one of IMAGENET1K_V1, IMAGENET1K_V2 for resnet50"),
        (("small_resnet", 32, "IMAGENET1K_V1"), 3, r"no pretrained weights; set network\.weights=null"),
        (("resnet18", 0), 3, r"network\.image_size 0, expected at least 1 pixel"),
        (("resnet18", 32, None, {"bogus": 1}), 3, "cannot build resnet18 .*'bogus': 1.*; change network.image_size or"),
        (("vit_b_16", 33), 3, "images of size 33"),
        (("small_resnet", 32, None, {"width": 0}), 3, "found width=0, expected at least 1 channel"),
        (("resnet18", 32), 0, "found 0 classes, expected at least 1"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, classes, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        build_network(NetworkConfig(*arguments), classes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        URLError("Name or service not known"),
        OSError("Network is unreachable"),
        RuntimeError("invalid hash value\n(expected x, got y)"),
        ConnectionResetError(),
    ],
)
def test_a_failed_download_says_what_to_do_instead(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(FileError) as caught:
        build_network(NetworkConfig("resnet18", 32, "IMAGENET1K_V1"), 3)
    message = str(caught.value)
    assert "network.weights=null" in message
    assert "base.checkpoint" in message
    assert "checkpoints" in message
    assert "\n" not in message


def pretrain(monkeypatch, name, **options):
    """Stand in for a download: weights of the published shapes."""
    torch.manual_seed(0)
    published = models.get_model(name, weights=None, num_classes=1000, **options).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: published)
    return published


def test_pretrained_weights_get_a_fresh_head_from_the_seed(monkeypatch):
    published = pretrain(monkeypatch, "resnet18")
    config = NetworkConfig("resnet18", 32, "IMAGENET1K_V1")
    first, again, other = (build_network(config, 5, seed=seed).state_dict() for seed in (3, 3, 4))
    for name, tensor in published.items():
        if not name.startswith("fc."):
            assert torch.equal(first[name], tensor)
    assert first["fc.weight"].shape == (5, 512)
    assert torch.equal(first["fc.bias"], torch.zeros(5))
    assert torch.equal(first["fc.weight"], again["fc.weight"])
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_pretrained_weights_with_auxiliary_heads_read_back_as_the_same_function(monkeypatch, name):
    pretrain(monkeypatch, name, aux_logits=True, init_weights=False)
    network = build_network(NetworkConfig(name, 96, "IMAGENET1K_V1"), 5).eval()
    plain = build_network(NetworkConfig(name, 96), 5).eval()
    fill_network(plain, network.state_dict(), "the file")
    inputs = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(plain(inputs), network(inputs))
    assert network.train()(inputs).shape == (2, 5)


@pytest.mark.parametrize("name", ["small_resnet", "mobilenet_v3_small"])
def test_the_seed_alone_decides_the_weights_and_the_global_generator_is_left_alone(name):
    config = NetworkConfig(name, 32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_network(config, 4, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = build_network(config, 4, seed=5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = build_network(config, 4, seed=6).state_dict()
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(("name", "millions"), [("small_resnet", 2.8), ("small_vit", 0.8)])
def test_the_small_networks_are_of_their_size(name, millions):
    network = build_network(NetworkConfig(name), 10)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


def test_options_that_do_not_fit_pretrained_weights_are_no_failed_download(monkeypatch: pytest.MonkeyPatch) -> None:
    state = models.resnet50().state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: state)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    config = NetworkConfig("resnet50", weights="IMAGENET1K_V1", options={"width_per_group": 128})
    with pytest.raises(ConfigurationError, match="weights IMAGENET1K_V1 do not fit; change"):
        build_network(config, 3)
