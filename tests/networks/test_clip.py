"""CLIP's vision tower under a zero-shot head: transformers' own logits, heads that stay, experts from folders."""

from dataclasses import replace

import pytest
import small_clip
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from coin.coding import Code
from coin.data.transform import to_input
from coin.errors import CoinError, ConfigurationError
from coin.files.downloads import hub_weights
from coin.merging import Refit, merge_networks
from coin.modules import Expert
from coin.modules.coded import Coded
from coin.networks import NetworkConfig, build_network, check_head, features_and_logits
from coin.networks.clip import zero_shot_head
from coin.networks.files import fill_head, import_pretrained
from coin.networks.hub import _configuration

DIGITS = ["zero", "one", "two", "three"]
LETTERS = list("abcde")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    small_clip.write_clip(folder)
    _configuration.cache_clear()
    return folder


@pytest.fixture
def config(place):
    return NetworkConfig(f"hf/{place}", small_clip.SIDE, "pretrained", {"head": "zero_shot"})


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tower(config, classes=DIGITS, prompts=small_clip.PROMPTS[:1], noise=0):
    network = build_network(config, len(classes)).eval()
    fill_head(network, config, (prompts, classes))
    if noise:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name != "head.weight":
                    draw = torch.Generator().manual_seed(noise)
                    parameter += 0.1 * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=draw)
    return network


@torch.no_grad()
def test_the_logits_are_clips_own_similarities(place, config, images):
    network = tower(config)
    found = network(to_input(images, small_clip.SIDE))
    expected = small_clip.similarities(transformers.CLIPModel.from_pretrained(place), images, DIGITS)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    features, logits = features_and_logits(network, to_input(images, small_clip.SIDE))
    check_head(network, features, logits)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))


@torch.no_grad()
def test_several_prompts_are_the_unit_mean_of_their_unit_vectors(place):
    head = zero_shot_head(str(place), small_clip.PROMPTS, LETTERS)
    model = transformers.CLIPModel.from_pretrained(place)
    tokens = small_clip.texts(LETTERS, small_clip.PROMPTS)
    vectors = F.normalize(model.text_projection(model.text_model(**tokens).pooler_output), dim=1)
    mean = F.normalize(vectors.view(len(LETTERS), len(small_clip.PROMPTS), -1).mean(1), dim=1)
    torch.testing.assert_close(head, model.logit_scale.exp() * mean)
    # The head is a property of the class: its rows do not depend on what stands beside it in a batch.
    alone = zero_shot_head(str(place), small_clip.PROMPTS, LETTERS[3:4])
    torch.testing.assert_close(alone[0], head[3])


@pytest.mark.parametrize("with_projection", [False, True])
def test_experts_are_imported_from_folders_with_their_projection_or_the_bases(
    config, place, tmp_path, with_projection, images
):
    kind = transformers.CLIPVisionModelWithProjection if with_projection else transformers.CLIPVisionModel
    other = kind.from_pretrained(place)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.1
    other.save_pretrained(tmp_path / "tuned")
    zero_shot = small_clip.PROMPTS[:1], DIGITS
    expert = import_pretrained(config, f"hf/{tmp_path / 'tuned'}", build_network(config, 4), zero_shot, "numbers")
    whole = transformers.CLIPModel.from_pretrained(place)
    theirs = [name for name, _ in whole.named_parameters() if name.startswith("vision_model.")]
    theirs += ["visual_projection.weight"] if with_projection else []
    with torch.no_grad():
        for name in theirs:
            whole.get_parameter(name).mul_(1.1)
        expected = small_clip.similarities(whole, images, DIGITS)
        torch.testing.assert_close(expert.eval()(to_input(images, small_clip.SIDE)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prefix", "safe"), [("", True), ("vision_model.", False)])
def test_towers_are_read_under_the_names_of_any_version_of_transformers(config, place, tmp_path, prefix, safe):
    transformers.CLIPVisionModel.from_pretrained(place).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    version = tuple(int(number) for number in transformers.__version__.split(".")[:2])
    if not prefix and version <= (5, 10):
        pytest.skip("this transformers reads the older names alone")
    state = {f"{prefix}{name.removeprefix('vision_model.')}": 2 * tensor for name, tensor in state.items()}
    if safe:
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert [path.parent for path in hub_weights(str(tmp_path))] == [tmp_path]
    network = build_network(config, 4)
    config.source.load(network, str(tmp_path))
    start = build_network(config, 4).vision.state_dict()
    for name, tensor in network.vision.state_dict().items():
        factor = 1 if name == "visual_projection.weight" else 2
        assert torch.equal(tensor, factor * start[name]), name


def test_a_folder_of_another_kind_is_one_line(config, tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**size, image_size=32, patch_size=8))
    vit.save_pretrained(tmp_path / "vit")
    for folder in ("vit", "nothing"):
        with pytest.raises(CoinError) as caught:
            import_pretrained(config, f"hf/{tmp_path / folder}", build_network(config, 4), None, "numbers")
        assert "\n" not in str(caught.value)
        assert ";" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "zero_shot", "message"),
    [
        ({"options": {}}, (["{}"], DIGITS), r"'numbers' with head\.zero_shot .*, whose head is trained; set"),
        ({}, None, r"'numbers' without head\.zero_shot .* is computed from class names; set network\.opt"),
        ({"options": {"head": "linear"}}, None, "found network.options.head 'linear', expected zero_shot, or nothing"),
    ],
)
def test_heads_that_do_not_fit_are_one_line(config, change, zero_shot, message, tmp_path):
    network = build_network(config, 4)
    with pytest.raises(ConfigurationError, match=message):
        fill_head(network, replace(config, **change), zero_shot, "numbers")
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="a ViTConfig, expected a CLIP; name one, such as hf/openai/clip"):
        NetworkConfig(f"hf/{tmp_path}", 32, None, {"head": "zero_shot"})


def test_the_head_is_not_trained(config):
    module = Expert(config.name, 32, "pretrained", config.options, num_classes=4)
    assert [name for name, each in module.network.named_parameters() if not each.requires_grad] == ["head.weight"]
    with pytest.raises(ConfigurationError, match="whose head is computed from class names; leave it out"):
        Expert(config.name, 32, "pretrained", config.options, num_classes=4, trainable=["head"])


def batches(count=12):
    draw = torch.Generator().manual_seed(3)
    return [[torch.randn(count, 3, 32, 32, generator=draw)] for _ in range(2)]


def test_an_experts_own_head_reads_a_merged_tower_as_text_similarities(config):
    experts = [tower(config, noise=1), tower(config, LETTERS, noise=2)]
    heads = [expert.head.weight.clone() for expert in experts]
    code = Code([[0.5, 0.5]])
    coded = merge_networks(Refit(), experts, code, calibration=batches())
    assert all(torch.equal(expert.head.weight, head) for expert, head in zip(experts, heads, strict=True))
    system = Coded(code, experts, coded)
    system.fit_decoder([each for own in batches() for each in own], erased=[0, 1], kind="expert_head")
    x = batches(5)[0][0]
    answers = system.decode(x, erased=[0, 1])
    with torch.no_grad():
        features = features_and_logits(coded[0], x)[0]
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    for answer, head in zip(answers, heads, strict=True):
        torch.testing.assert_close(answer[:, : len(head)], features @ head.T, rtol=1e-4, atol=1e-4)
