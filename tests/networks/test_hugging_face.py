"""Classifiers of Hugging Face's transformers, from folders with a configuration: nothing is downloaded."""

import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers
from closeness import check_equal

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
    "num_labels": 5,
}
OF_TEXTS = SMALL | {"vocab_size": 30, "max_position_embeddings": 12}
KINDS = {
    "bert": transformers.BertConfig(**OF_TEXTS),
    # whose head is registered before the encoder
    "xlm_roberta": transformers.XLMRobertaConfig(**OF_TEXTS, pad_token_id=1),
    "vit": transformers.ViTConfig(**SMALL, image_size=32, patch_size=8),
}


AUTO = {
    "bert": transformers.AutoModelForSequenceClassification,
    "xlm_roberta": transformers.AutoModelForSequenceClassification,
    "vit": transformers.AutoModelForImageClassification,
}


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes a folder as `save_pretrained` leaves it, with weights, and returns its path."""

    def make(kind):
        torch.manual_seed(0)
        AUTO[kind].from_config(KINDS[kind]).save_pretrained(tmp_path / kind)
        _configuration.cache_clear()
        return tmp_path / kind

    return make


def config_of(folder, **options):
    size = 32 if folder.name == "vit" else 8
    return NetworkConfig(f"hf/{folder}", size, **options)


def inputs_of(kind):
    draw = torch.Generator().manual_seed(1)
    if kind == "vit":
        return torch.randn(3, 3, 32, 32, generator=draw)
    tokens = torch.randint(3, 30, (3, 8), generator=draw)
    tokens[1, 5:] = KINDS[kind].pad_token_id
    return tokens


@torch.no_grad()
def answers(network, x):
    return logits_of(network.eval(), x)


@pytest.mark.parametrize("kind", KINDS)
def test_classifiers_are_built_run_and_written(kind, folder, tmp_path):
    config = config_of(folder(kind))
    network = build_network(config, 3, seed=1).eval()
    x = inputs_of(kind)
    with torch.no_grad():
        features, logits = features_and_logits(network, x)
    check_head(network, features, logits)
    assert logits.shape == (3, 3)
    named = {"pixel_values": x}
    if kind != "vit":
        mask = x != KINDS[kind].pad_token_id
        named = {"input_ids": x, "attention_mask": mask.long()}
        without_padding = answers(network, x[1:2, :5])
        torch.testing.assert_close(without_padding, logits[1:2])
    assert config.reads == ("images" if kind == "vit" else "texts")
    torch.testing.assert_close(answers(network, named), logits)
    save_network(tmp_path / "expert.safetensors", network, config, 3, {})
    again = load_network(tmp_path / "expert.safetensors").network
    assert torch.equal(answers(again, x), logits)
    assert torch.equal(answers(deepcopy(network), x), logits)
    same = build_network(config, 3, seed=1)
    assert torch.equal(answers(same, x), logits)


@pytest.mark.parametrize("kind", ["xlm_roberta", "vit"])
def test_pretrained_weights_get_a_fresh_head(kind, folder):
    place = folder(kind)
    theirs = AUTO[kind].from_pretrained(place).state_dict()
    network = build_network(config_of(place, weights="pretrained"), 3, seed=1)
    head = head_name(network)
    assert network.get_submodule(head).out_features == 3
    for key, tensor in network.state_dict().items():
        assert key.startswith(head) or torch.equal(tensor, theirs[key]), key


def test_images_are_normalised_as_the_folder_says(folder):
    place = folder("vit")
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (place / "preprocessor_config.json").write_text(json.dumps(processor))
    network = build_network(config_of(place), 3)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    own = answers(network, (x - mean) / std)
    network._forward_pre_hooks.clear()
    torch.testing.assert_close(own, answers(network, (x - 0.5) / 0.5), rtol=1e-4, atol=1e-5)


def test_an_empty_text_attends_to_its_first_token(folder):
    network = build_network(config_of(folder("bert")), 3)
    empty = torch.zeros(2, 8, dtype=torch.int64)
    mask = empty.clone()
    mask[:, 0] = 1
    theirs = answers(network, {"input_ids": empty, "attention_mask": mask})
    torch.testing.assert_close(answers(network, empty), theirs)


def test_texts_that_are_too_long_are_refused(folder):
    network = build_network(config_of(folder("bert")), 3)
    message = "found texts of 13 tokens, expected at most 12; set max_tokens of tasks"
    with pytest.raises(DataError, match=message):
        network(torch.ones(2, 13, dtype=torch.int64))


def test_the_packaged_encoder_is_a_folder_like_others(folder, tmp_path, monkeypatch):
    package = tmp_path / MINILM
    package.mkdir()
    (package / "__init__.py").touch()
    folder("bert").rename(package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    network = build_network(NetworkConfig(f"hf/{MINILM}", 8, "pretrained"), 3)
    theirs = transformers.BertModel.from_pretrained(package / "model")
    check_equal(network.bert, theirs)


def test_images_of_another_size_have_their_positions_interpolated(folder):
    options = {"num_hidden_layers": 1}
    config = NetworkConfig(f"hf/{folder('vit')}", 16, "pretrained", options)
    network = build_network(config, 3)
    assert answers(network, torch.randn(2, 3, 16, 16)).shape == (2, 3)
    layers = [name for name in network.state_dict() if name.endswith("layernorm_before.weight")]
    assert len(layers) == 1
    assert network.vit.embeddings.position_embeddings.shape[1] == 17


WRONG = {
    "cannot read network.name .*, or hf/ID": {"name": "hf/nothing/there"},
    "expected hf/FOLDER with a config.json of a classifier": {
        "name": f"hf/{Path(__file__).parent}"
    },
    "found network.weights 'V1', expected pretrained or null": {"weights": "V1"},
    "found network.options with 'depth', expected entries of": {"options": {"depth": 3}},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_one_line(message, folder):
    given = {"name": f"hf/{folder('bert')}"} | WRONG[message]
    with pytest.raises((ConfigurationError, FileError), match=message) as caught:
        build_network(NetworkConfig(**given), 3)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    _configuration.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = r"found no package transformers.*pip install '\.\[text\]'"
    with pytest.raises(ConfigurationError, match=message):
        build_network(NetworkConfig("hf/some/model"), 2)


def test_an_expert_from_a_folder_brings_its_head(folder):
    place = folder("bert")
    config = config_of(place)
    expert = import_pretrained(config, f"hf/{place}", build_network(config, 5))
    theirs = AUTO["bert"].from_pretrained(place)
    check_equal(expert, theirs)
    with pytest.raises(StateError, match=r"of shape \[5, 16\], expected \[4, 16\]; it has another"):
        import_pretrained(config, f"hf/{place}", build_network(config, 4))
    (place / "model.safetensors").unlink()
    with pytest.raises(FileError, match=rf"cannot get the weights pretrained of hf/{place} \("):
        import_pretrained(config, f"hf/{place}", build_network(config, 5))


def test_a_folder_says_how_many_classes_its_head_has(folder, tmp_path):
    config = config_of(folder("bert"))
    network = build_network(config, 5, seed=1)
    replace_head(network, 3)  # an expert's own, in a body of more classes
    config.source.save(network, tmp_path / "expert")
    loaded = AUTO["bert"].from_pretrained(tmp_path / "expert")
    check_equal(loaded, network)


def test_loading_is_silent_and_leaves_the_process_s_verbosity(folder, capfd):
    logging = transformers.utils.logging
    place = folder("bert")
    before = logging.get_verbosity()
    capfd.readouterr()
    try:
        logging.set_verbosity_info()
        build_network(config_of(place, weights="pretrained"), 3)
        assert "Loading weights" not in capfd.readouterr().err
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)
