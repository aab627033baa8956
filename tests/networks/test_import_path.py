"""Networks of the user's own, by import path."""

import sys

import pytest
import torch

from coin.errors import ConfigurationError
from coin.networks import NetworkConfig, build_network

MODULE = """
from torch import nn

class Small(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.layers(x))

class Reader(nn.Embedding):
    reads = "texts"

class Fixed(nn.Module):
    def __init__(self, width=4):
        super().__init__()

def function(num_classes):
    return nn.Linear(1, num_classes)
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ownnetworks.py").write_text(MODULE)
    yield
    sys.modules.pop("ownnetworks", None)


def test_a_class_is_found():
    network = build_network(NetworkConfig("ownnetworks.Small", 16, None, {"width": 6}), 5, seed=2)
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    assert network.fc.in_features == 6
    again = build_network(NetworkConfig("ownnetworks.Small", 16, None, {"width": 6}), 5, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert NetworkConfig("ownnetworks.Small").reads == "images"
    assert NetworkConfig("ownnetworks.Reader").reads == "texts"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "ownnetwork.Small",
            r"path of a class \(No module named 'ownnetwork'\); check the spelling, or run",
        ),
        ("ownnetworks.Smal", r"the import path of a class \(module 'ownnetworks' has no attribute 'Smal'"),
        ("ownnetworks.function", "found network.name 'ownnetworks.function', a function, expected an nn.Module"),
        ("torch.Tensor", "a _TensorMeta, expected an nn.Module"),
    ],
)
def test_what_is_no_network_is_one_line(name, message):
    with pytest.raises(ConfigurationError, match=message):
        NetworkConfig(name)


def test_a_class_that_takes_no_class_count_is_told_to():
    with pytest.raises(ConfigurationError, match="argument 'num_classes'; let its __init__ take num_classes"):
        build_network(NetworkConfig("ownnetworks.Fixed", 16), 5)


def test_it_is_refused_where_configurations_are_not_trusted(monkeypatch):
    monkeypatch.setenv("COIN_SAFE", "1")
    with pytest.raises(ConfigurationError, match=r"found network\.name 'ownnetworks\.Small' with --safe"):
        NetworkConfig("ownnetworks.Small")
    assert "ownnetworks" not in sys.modules


def test_named_weights_are_refused():
    with pytest.raises(ConfigurationError, match=r"'ownnetworks.Small' has no pretrained weights; .*or to a file"):
        NetworkConfig("ownnetworks.Small", 16, "IMAGENET1K_V1")
