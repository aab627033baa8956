import sys
from copy import deepcopy
from urllib.error import URLError

import pytest
import torch
from closeness import check_equal
from torchvision import models

from coin.errors import CoinError, ConfigurationError, FileError
from coin.networks import (
    NetworkConfig,
    build_network,
    check_head,
    features_and_logits,
    head_name,
    load_network,
    save_network,
)
from coin.networks.heads import replace_head
from coin.networks.registry import empty_network
from coin.networks.sources import Own

# One of every family that differs in its head or in how it is built: name, image size, the head, its inputs.
FAMILIES = [
    ("small_resnet", 32, "fc", 256),
    ("small_vit", 32, "heads.head", 128),
    ("mobilenet_v3_small", 32, "classifier.3", 1024),
    ("vit_b_32", 32, "heads.head", 768),
    ("swin_t", 32, "head", 768),
    ("alexnet", 64, "classifier.6", 4096),
    ("timm/test_vit", 32, "head", 64),
    ("timm/test_efficientnet", 32, "classifier", 256),
    ("timm/test_convnext", 32, "head.fc", 64),
]


@pytest.mark.parametrize(("name", "size", "head", "width"), FAMILIES)
def test_every_family_has_a_head_of_the_wanted_classes_and_is_read_back(
    name, size, head, width, tmp_path
):
    config = NetworkConfig(name, size)
    network = build_network(config, 7).eval()
    inputs = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    save_network(tmp_path / "net.safetensors", network, config, 7, {})
    again = load_network(tmp_path / "net.safetensors").network
    with torch.no_grad():
        features, logits = features_and_logits(network, inputs)
        assert torch.equal(again(inputs), logits)
        assert torch.equal(deepcopy(network)(inputs), logits)
    assert head_name(network) == head
    assert features.shape == (2, width)
    assert logits.shape == (2, 7)
    check_head(network, features, logits)


def test_a_failed_download_says_what_to_do_instead(monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    message = r"checkpoints, or set network.weights=null .*base.checkpoint"
    with pytest.raises(FileError, match=message) as caught:
        build_network(NetworkConfig("resnet18", 32, "IMAGENET1K_V1"), 3)
    assert "\n" not in str(caught.value)


@pytest.fixture
def published(monkeypatch):
    """Return a function that has torchvision's weights of a network be new ones, and returns these."""

    def publish(name):
        weights = models.get_model(name, num_classes=1000, weights=None).state_dict()
        get = "torchvision.models._api.WeightsEnum.get_state_dict"
        monkeypatch.setattr(get, lambda *args, **options: weights)
        return weights

    return publish


def test_pretrained_weights_get_a_fresh_head(published):
    theirs = published("resnet18")
    network = build_network(NetworkConfig("resnet18", 32, "IMAGENET1K_V1"), 5)
    assert network.fc.weight.shape == (5, 512)
    assert network.fc.weight.std() < 0.02  # its constructor draws up to 1/√F
    assert not network.fc.bias.any()
    for name, tensor in network.state_dict().items():
        assert name.startswith("fc.") or torch.equal(tensor, theirs[name]), name


def test_the_seed_alone_decides_the_weights_and_the_global_generator_is_left_alone():
    config = NetworkConfig("small_resnet", 32)
    before = torch.get_rng_state()
    first = build_network(config, 4, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    check_equal(build_network(config, 4, seed=5), first)
    other = build_network(config, 4, seed=6)
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_the_colours_of_an_image_do_not_matter_to_the_small_vit():
    config = NetworkConfig("small_vit", 16, None, {"depth": 1, "patch_size": 8})
    network = build_network(config, 3)
    replace_head(network.heads, 3)  # the fresh head is zero
    network.double().eval()
    inputs = torch.randn(2, 3, 16, 16).double()
    gain = torch.tensor([0.5, 2.0, 3.0])[:, None, None]
    with torch.no_grad():
        logits = network(inputs)
        torch.testing.assert_close(network(gain * inputs - gain), logits, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(network(inputs.flip(3)), logits, rtol=1e-2)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out(name):
    network = build_network(NetworkConfig(name, 96), 3).train()
    assert not any("aux" in parameter.lower() for parameter in network.state_dict())
    assert network(torch.zeros(2, 3, 96, 96)).shape == (2, 3)


def test_a_file_of_pretrained_weights_transforms_its_inputs_as_they_want(tmp_path, published):
    published("googlenet")
    config = NetworkConfig("googlenet", 64, "IMAGENET1K_V1")
    network = build_network(config, 3).eval()
    save_network(tmp_path / "net.safetensors", network, config, 3, {})
    again = load_network(tmp_path / "net.safetensors").network
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(images), network(images))


def test_a_constructor_that_cannot_read_a_file_of_its_own_is_no_download(monkeypatch):
    def read(**options):
        raise FileNotFoundError("labels.txt")

    monkeypatch.setitem(Own.kinds, "reading", read)
    message = r"cannot build reading .*: labels\.txt; change network\.name"
    with pytest.raises(ConfigurationError, match=message):
        build_network(NetworkConfig("reading"), 3)


# Networks of the user's own, by import path

MODULE = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        if width < 1:
            raise RuntimeError("mine")
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.layers(x))

class Looking(Small):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]

class Versioned(Small):
    def get_extra_state(self):
        return {"version": 1}

class Reader(nn.Embedding):
    reads = "texts"

class Fixed(nn.Module):
    def __init__(self, width=4):
        super().__init__()

def function(num_classes):
    return nn.Linear(1, num_classes)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ownnetworks.py").write_text(MODULE)
    yield
    sys.modules.pop("ownnetworks", None)


@pytest.mark.usefixtures("module")
def test_a_class_of_the_users_own_is_found():
    config = NetworkConfig("ownnetworks.Small", 16, None, {"width": 6})
    network, again = (build_network(config, 5, seed=2) for _ in "ab")
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    assert network.fc.in_features == 6
    check_equal(network, again)
    assert (config.reads, NetworkConfig("ownnetworks.Reader").reads) == ("images", "texts")
    with pytest.raises(RuntimeError, match=r"^mine$"):  # with its traceback
        build_network(NetworkConfig("ownnetworks.Small", 16, None, {"width": 0}), 5)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("name", ["ownnetworks.Looking", "regnet_x_400mf"])
def test_names_and_shapes_are_known_of_networks_that_look_at_their_tensors_while_they_are_built(
    name,
):
    """A stochastic depth's rates were read of tensors without values."""
    config = NetworkConfig(name, 32)
    empty = empty_network(config, 5).state_dict()
    expected = build_network(config, 5).to("meta").state_dict()
    assert {key: (each.device, each.shape) for key, each in empty.items()} == {
        key: (each.device, each.shape) for key, each in expected.items()
    }


NORMALISATION = "expected neither, or both: three numbers each, std above 0"
# Options of a network, and what is said of them.
WRONG = [
    (("resnet5O",), "cannot build resnet5O with image_size 32,.*; change network.name"),
    (("resnet50", 32, "V3"), "cannot build resnet50 .* weights V3 and options"),
    (("small_resnet", 32, "V1"), "found network.weights 'V1', expected null for small"),
    (("resnet18", 0), r"network\.image_size=0, expected a whole number of at least 1"),
    (("resnet18", 32, None, {"bogus": 1}), "cannot build resnet18 .*'bogus': 1.*; change network"),
    (("resnet18", 32, None, {"num_classes": 4}), "network.options with 'num_classes', which coin"),
    (("resnet18", 32, None, {}, [0.5] * 3), NORMALISATION),
    (("resnet18", 32, None, {}, [0.5] * 3, [0, 1, 1]), NORMALISATION),
    (("small_vit", 32, None, {"patch_size": 5}), "cannot build small_vit with image_size 32"),
    (("squeezenet1_1", 64), "found no Linear layer in SqueezeNet; name the head by an attribute"),
    (("timm/resnet5O",), r"cannot build timm/resnet5O .*; change network.name"),
    (("timm/resnet50", 64, "a9"), r"cannot build timm/resnet50 .*weights a9 "),
    (("timm/resnet50", 32, "a1_in1k"), r"cannot get the weights a1_in1k of .*HF_HOME"),
    (("timm/deit_tiny_distilled_patch16_224",), r"whose head is .*, expected one classifier"),
    (("timm/test_resnet", 32, None, {"bogus": 1}), "cannot build timm/test_resnet .*bogus"),
    (("ownnetwork.Small",), r"path of a class .*'ownnetwork'.*; check the spelling, or run"),
    (("ownnetworks.Smal",), r"the import path of a class \(module 'ownnetworks' has no attribute"),
    (("ownnetworks.function",), "'ownnetworks.function', a function, expected an nn.Module"),
    (("ownnetworks.Versioned", 16), "found '_extra_state' of type dict in a network's state"),
    (("ownnetworks.Fixed", 16), r"argument 'num_classes'\); let its __init__ take these"),
    (("ownnetworks.Small", 16, None, {"depth": 2}), r"argument 'depth'\); let its __init__ take"),
]


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_does_not_fit_is_one_line(options, message):
    with pytest.raises(CoinError, match=message) as caught:
        build_network(NetworkConfig(*options), 3)
    assert "\n" not in str(caught.value)
