"""Classifiers of Hugging Face's transformers, from folders with a configuration: nothing is downloaded."""

import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers

from coin.core.batches import IMAGENET_MEAN, IMAGENET_STD
from coin.errors import ConfigurationError, DataError, FileError, StateError
from coin.networks import NetworkConfig, build_network, check_head, features_and_logits, head_name
from coin.networks.calling import logits_of
from coin.networks.files import import_pretrained, load_network, save_network
from coin.networks.heads import replace_head
from coin.networks.hub import MINILM, _configuration

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
CONFIGURATIONS = {
    "bert": transformers.BertConfig(**SMALL, vocab_size=30, max_position_embeddings=12),
    "roberta": transformers.RobertaConfig(
        **SMALL, vocab_size=30, max_position_embeddings=12, pad_token_id=1
    ),
    # whose head is registered before the encoder
    "xlm_roberta": transformers.XLMRobertaConfig(
        **SMALL, vocab_size=30, max_position_embeddings=12, pad_token_id=0
    ),
    "vit": transformers.ViTConfig(**SMALL, image_size=32, patch_size=8),
    "resnet": transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    ),
}
AUTO = ("AutoModelForImageClassification", "AutoModelForSequenceClassification")
TEXTS = ("bert", "roberta", "xlm_roberta")


@pytest.fixture
def folder(tmp_path):
    """A folder as `save_pretrained` leaves it, with weights."""

    def make(kind, processor=None):
        torch.manual_seed(0)
        configuration = deepcopy(CONFIGURATIONS[kind])
        configuration.num_labels = 5
        path = tmp_path / kind
        getattr(transformers, AUTO[kind in TEXTS]).from_config(configuration).save_pretrained(path)
        if processor:
            (path / "preprocessor_config.json").write_text(json.dumps(processor))
        _configuration.cache_clear()
        return f"hf/{path}"

    return make


def size_of(kind):
    return 8 if kind in TEXTS else 32


def inputs_of(kind, count=3):
    draw = torch.Generator().manual_seed(1)
    if kind not in TEXTS:
        return torch.randn(count, 3, 32, 32, generator=draw)
    tokens = torch.randint(3, 30, (count, 8), generator=draw)
    tokens[1, 5:] = 1 if kind == "roberta" else 0
    return tokens


def answers(network, x):
    with torch.no_grad():
        return logits_of(network, x)


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_classifiers_are_built_run_and_written(kind, folder, tmp_path):
    config = NetworkConfig(folder(kind), size_of(kind))
    assert config.reads == ("texts" if kind in TEXTS else "images")
    network = build_network(config, 3, seed=1).eval()
    x = inputs_of(kind)
    with torch.no_grad():
        features, logits = features_and_logits(network, x)
    check_head(network, features, logits)
    assert logits.shape == (3, 3)
    if kind in TEXTS:
        mask = (x != (1 if kind == "roberta" else 0)).long()
        theirs = network(input_ids=x, attention_mask=mask).logits
        torch.testing.assert_close(answers(network, x[1:2, :5]), logits[1:2])  # without its padding
    else:
        theirs = network(pixel_values=x).logits
    torch.testing.assert_close(theirs, logits)
    save_network(tmp_path / "expert.safetensors", network, config, 3, {})
    assert torch.equal(answers(load_network(tmp_path / "expert.safetensors").network, x), logits)
    assert torch.equal(answers(deepcopy(network), x), logits)
    same = build_network(config, 3, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), same.parameters(), strict=True)
    )


@pytest.mark.parametrize("kind", ["bert", "xlm_roberta", "vit"])
def test_pretrained_weights_get_a_fresh_head(kind, folder):
    name = folder(kind)
    theirs = (
        getattr(transformers, AUTO[kind in TEXTS])
        .from_pretrained(name.removeprefix("hf/"))
        .state_dict()
    )
    network = build_network(NetworkConfig(name, size_of(kind), "pretrained"), 3, seed=1)
    head = head_name(network)
    for key, tensor in network.state_dict().items():
        assert key.startswith(head) or torch.equal(tensor, theirs[key]), key
    assert network.get_submodule(head).out_features == 3


def test_images_are_normalised_as_the_folder_says(folder):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    config = NetworkConfig(folder("vit", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}), 32)
    network = build_network(config, 3, seed=1).eval()
    own = answers(network, (x - mean) / std)
    network._forward_pre_hooks.clear()
    torch.testing.assert_close(own, answers(network, (x - 0.5) / 0.5), rtol=1e-4, atol=1e-5)


def test_an_empty_text_attends_to_its_first_token(folder):
    network = build_network(NetworkConfig(folder("bert"), 8), 3).eval()
    empty = torch.zeros(2, 8, dtype=torch.int64)
    mask = torch.zeros(2, 8, dtype=torch.int64)
    mask[:, 0] = 1
    with torch.no_grad():
        theirs = network(input_ids=empty, attention_mask=mask).logits
    torch.testing.assert_close(answers(network, empty), theirs)


def test_texts_that_are_too_long_are_refused(folder):
    network = build_network(NetworkConfig(folder("bert"), 32), 3)
    with pytest.raises(
        DataError, match="found texts of 13 tokens, expected at most 12; set max_tokens of tasks"
    ):
        network(torch.ones(2, 13, dtype=torch.int64))


def test_the_packaged_encoder_is_a_folder_like_others(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("coin.files.packaged.find_spec", lambda name: None)
    with pytest.raises(
        FileError, match=rf"no package {MINILM} with a file model/config.json.*\.\[text\]"
    ):
        build_network(NetworkConfig(f"hf/{MINILM}"), 2)
    monkeypatch.undo()
    (tmp_path / MINILM).mkdir()
    (tmp_path / MINILM / "__init__.py").touch()
    name = folder("bert")
    Path(name.removeprefix("hf/")).rename(tmp_path / MINILM / "model")
    monkeypatch.syspath_prepend(tmp_path)
    network = build_network(NetworkConfig(f"hf/{MINILM}", 8, "pretrained"), 3).eval()
    theirs = transformers.BertModel.from_pretrained(tmp_path / MINILM / "model").state_dict()
    for key, tensor in network.bert.state_dict().items():
        assert torch.equal(tensor, theirs[key]), key
    x = inputs_of("bert")
    torch.testing.assert_close(
        answers(network, x[1:2, :5]), answers(network, x)[1:2]
    )  # without its padding


def test_images_of_another_size_have_their_positions_interpolated(folder):
    name = folder("vit")
    network = build_network(
        NetworkConfig(name, 16, "pretrained", {"num_hidden_layers": 1}), 3
    ).eval()
    assert answers(network, torch.randn(2, 3, 16, 16)).shape == (2, 3)
    assert sum(type(module).__name__ == "ViTLayer" for module in network.modules()) == 1
    assert network.vit.embeddings.position_embeddings.shape[1] == 17


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "hf/nothing/there"}, "cannot read network.name .*, or hf/ID"),
        (
            {"name": f"hf/{Path(__file__).parent}"},
            r"expected hf/FOLDER with a config.json of a classifier",
        ),
        (
            {"weights": "IMAGENET1K_V1"},
            "found network.weights 'IMAGENET1K_V1', expected pretrained or null",
        ),
        (
            {"options": {"depth": 3}},
            "found network.options with 'depth', expected entries of the configuration",
        ),
    ],
)
def test_what_is_wrong_is_one_line(options, message, folder):
    given = {"name": folder("bert"), "image_size": 8} | options
    with pytest.raises((ConfigurationError, FileError), match=message) as caught:
        build_network(NetworkConfig(**given), 3)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    _configuration.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ConfigurationError, match=r"found no package transformers.*pip install '\.\[text\]'"
    ):
        build_network(NetworkConfig("hf/some/model"), 2)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_an_expert_from_a_folder_brings_its_head(kind, folder):
    name = folder(kind)
    config = NetworkConfig(name, size_of(kind), "pretrained")
    expert, theirs = (
        import_pretrained(config, name, build_network(config, 5)),
        build_network(config, 5),
    )
    found = getattr(transformers, AUTO[kind in TEXTS]).from_pretrained(name.removeprefix("hf/"))
    theirs.load_state_dict(found.state_dict())
    x = inputs_of(kind)
    assert torch.equal(answers(expert.eval(), x), answers(theirs.eval(), x))
    with pytest.raises(
        StateError, match=r"of shape \[5, 16\], expected \[4, 16\]; it has another architecture or"
    ):
        import_pretrained(config, name, build_network(config, 4))
    (Path(name.removeprefix("hf/")) / "model.safetensors").unlink()
    with pytest.raises(
        FileError, match=rf"cannot get the weights pretrained of {name} \(.*no file named"
    ):
        import_pretrained(NetworkConfig(name, size_of(kind)), name, build_network(config, 5))


def test_a_folder_says_how_many_classes_its_head_has(folder, tmp_path):
    config = NetworkConfig(folder("bert"), 8)
    network = build_network(config, 5, seed=1).eval()
    replace_head(network, 3)  # an expert's own, in a body of more classes
    config.source.save(network, tmp_path / "expert")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "expert"
    ).eval()
    x = inputs_of("bert")
    with torch.no_grad():
        theirs = loaded(input_ids=x, attention_mask=(x != 0).long()).logits
    torch.testing.assert_close(theirs, answers(network, x))
