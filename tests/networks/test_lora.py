"""Low-rank adapters: where they go, what they compute, and that nothing of them is left when they are merged."""

import importlib.util
from copy import deepcopy

import pytest
import torch
from torch import nn

from coin.errors import ConfigurationError
from coin.networks import Lora, NetworkConfig, add_adapters, build_network, unwrap
from coin.networks.lora import adaptable_layers

IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randint(0, 50, (5, 8), generator=torch.Generator().manual_seed(0))
VIT = NetworkConfig("small_vit", 16, None, {"depth": 2, "width": 16, "mlp_width": 24})
MINILM = NetworkConfig(
    "minilm", 8, None, {"depth": 2, "width": 16, "mlp_width": 24, "heads": 2, "vocabulary": 50, "dropout": 0.0}
)
BERT_LAYERS = [
    *(f"attention.self.{part}" for part in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
]
CASES = {"vit": (VIT, IMAGES), "minilm": (MINILM, TOKENS)}


def adapted(case, **options):
    """Return a network in float64, the same with adapters of random A and B, and inputs."""
    config, inputs = CASES[case]
    network = build_network(config, 3).double()
    with torch.no_grad():
        network.get_submodule("heads.head" if case == "vit" else "head").weight.normal_()
    other = deepcopy(network)
    add_adapters(other, Lora(**{"rank": 3, "alpha": 5.0, **options}), inputs[:1])
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return network, other.double(), inputs


@pytest.mark.parametrize(
    ("case", "layers"),
    [
        ("vit", [f"encoder.layers.encoder_layer_{i}.mlp.{j}" for i in range(2) for j in (0, 3)]),
        ("minilm", [f"bert.encoder.layer.{i}.{name}" for i in range(2) for name in BERT_LAYERS]),
    ],
)
def test_layers_that_run_by_themselves_can_be_adapted(case, layers):
    """Not the head, and not `out_proj`, whose weights packed attention reads past it."""
    config, inputs = CASES[case]
    network = build_network(config, 3).double().train()
    hooks = [len(module._forward_pre_hooks) for module in network.modules()]
    assert adaptable_layers(network, inputs[:1]) == layers
    assert all(module.training for module in network.modules())
    assert [len(module._forward_pre_hooks) for module in network.modules()] == hooks


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_w_plus_the_scaled_product(case):
    network, other, _ = adapted(case)
    merged, tensors = unwrap(other).state_dict(), other.state_dict()
    before = network.state_dict()
    assert list(merged) == list(before)
    products = 0
    for name, tensor in before.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in tensors:
            product = tensors[f"{layer}.lora_B.default.weight"] @ tensors[f"{layer}.lora_A.default.weight"]
            torch.testing.assert_close(merged[name], tensor + 5 / 3 * product)
            products += 1
        else:
            assert torch.equal(merged[name], tensor)
    assert products == (4 if case == "vit" else 2 * len(BERT_LAYERS))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_adapters_count_in_training_and_in_evaluation(case, training):
    """torch's fast path for transformers in evaluation would pass them by."""
    network, other, inputs = adapted(case)
    with torch.no_grad():
        logits = other.train(training)(inputs)
        torch.testing.assert_close(logits, unwrap(other).train(training)(inputs))
        assert not torch.allclose(logits, network.train(training)(inputs))


def test_they_begin_without_an_effect_and_the_same_for_one_seed():
    network = build_network(VIT, 3).double().eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second, third = (deepcopy(network) for _ in range(3))
    for each, seed in ((first, 0), (second, 0), (third, 1)):
        add_adapters(each, Lora(), IMAGES[:1], seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(IMAGES), network(IMAGES))
    tensors, again, other = (each.state_dict() for each in (first, second, third))
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert any(not torch.equal(tensors[name], other[name]) for name in tensors)


def test_what_required_gradients_does_so_still():
    network = build_network(VIT, 3)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith("ln.bias"))
    add_adapters(network, Lora(targets=["*layer_1.mlp.0"]), IMAGES[:1].float())
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    layer = "encoder.layers.encoder_layer_1.mlp.0"
    assert trained == {"encoder.ln.bias", f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"}


def test_a_plain_network_is_returned_itself_and_a_frozen_one_as_a_copy():
    network = build_network(VIT, 3)
    assert unwrap(network) is network
    network.requires_grad_(False)
    plain = unwrap(network)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (
            VIT,
            ["*.mlp.*", "*.self_attention.*"],
            r"found lora.targets pattern '\*.self_attention.\*', which matches no",
        ),
        (VIT, ["heads.head"], r"which matches no linear layer of SmallViT .*\.encoder_layer_0\.mlp\.0"),
        (
            NetworkConfig("small_resnet", 16),
            ["*"],
            "no linear layer of SmallResNet .*none does",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_with_what_can_be_adapted(config, targets, message):
    with pytest.raises(ConfigurationError, match=message):
        add_adapters(build_network(config, 3), Lora(targets=targets), IMAGES[:1].float())


def test_projections_that_are_read_past_their_layers_are_left_alone():
    """torchvision's Swin calls a function of its attention's weights."""
    network = build_network(NetworkConfig("swin_t", 32, None, {}), 3)
    layers = adaptable_layers(network, torch.zeros(1, 3, 32, 32))
    assert layers
    assert all(".mlp." in name or name.endswith("reduction") for name in layers)
    assert any(isinstance(module, nn.Linear) for name, module in network.named_modules() if name.endswith("attn.qkv"))


def test_without_peft_one_line_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("coin.networks.lora.find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(
        ConfigurationError, match=r"^found lora and no package peft, .* pip install '\.\[lora\]' in a copy"
    ):
        add_adapters(build_network(VIT, 3), Lora(), IMAGES[:1].float())


@pytest.mark.parametrize(
    "options",
    [
        *({"rank": value} for value in (0, 2.0, True)),
        *({"alpha": value} for value in (0.0, "8", float("nan"))),
        *({"dropout": value} for value in (1.0, -0.1)),
        *({"targets": value} for value in ([], "*")),
    ],
)
def test_bad_options_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigurationError, match=rf"found .*lora\.{name}="):
        Lora(**options)
