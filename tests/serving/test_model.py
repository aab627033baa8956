"""A network as a server."""

from pathlib import Path

import pytest
import torch

from coin.coding import DecoderConfig
from coin.errors import ConfigurationError, DataError
from coin.networks import NetworkConfig, build_network, save_network
from coin.serving.model import NetworkServer


def test_replies_are_padded_to_the_largest_class_count(tmp_path: Path, small_config: NetworkConfig) -> None:
    path = tmp_path / "expert.safetensors"
    save_network(path, build_network(small_config, 3), small_config, 3, {})
    images = torch.randint(256, (2, 1, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    plain = NetworkServer(path, 5, DecoderConfig("linear"))(images)
    assert plain.logits.shape == (2, 5)
    assert not plain.logits[:, 3:].any()
    assert plain.features is None
    server = NetworkServer(path, 5, DecoderConfig("feature_ridge"))
    reply = server(images)
    assert reply.features is not None
    assert server.feature_widths() == (reply.features.shape[1],)
    with pytest.raises(DataError, match="expected"):
        server(images.float())


def test_networks_for_texts_are_not_served(tmp_path: Path) -> None:
    options = {"vocabulary": 20, "depth": 1, "heads": 2, "width": 8, "mlp_width": 8}
    config = NetworkConfig("minilm", 6, None, options)
    save_network(tmp_path / "text.safetensors", build_network(config, 3), config, 3, {})
    with pytest.raises(ConfigurationError, match="network for texts, expected one for images"):
        NetworkServer(tmp_path / "text.safetensors", 3, DecoderConfig("linear"))
