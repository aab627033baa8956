import pytest
import torch
from torch import nn

from coin.errors import StateError
from coin.networks import NetworkConfig, build_network, features_and_logits
from coin.networks.stages import stage_names, stages_and_logits

DIMS = (16, 32, 64, 128)

# One a family of torchvision's, where the family is not built like another one here.
FAMILIES = {
    "small_resnet": 16,
    "small_vit": 16,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "regnet_y_400mf": 32,
    "convnext_tiny": 32,
    "efficientnet_b0": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "densenet121": 32,
    "vit_b_32": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vgg11_bn": 32,
    "alexnet": 64,
    "squeezenet1_1": 64,
    "shufflenet_v2_x0_5": 32,
    "mnasnet0_5": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "maxvit_t": 224,
}


def images(size, count=3):  # no network here has as many tokens
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_stages_from_one_pass(name):
    size = FAMILIES[name]
    network = build_network(NetworkConfig(name, size), 3).eval()
    passes = []
    network.register_forward_hook(lambda *_: passes.append(1))
    hooks = [len(module._forward_pre_hooks) for module in network.modules()]
    with torch.no_grad():
        features, logits, widths = stages_and_logits(network, images(size))
        assert len(passes) == 1
        last, alone = features_and_logits(network, images(size))
    assert 2 <= len(widths) <= 6
    assert features.shape == (3, sum(widths))
    assert torch.equal(features[:, -widths[-1] :], last)
    assert torch.equal(logits, alone)
    assert len(set(stage_names(network))) == len(widths)
    assert [len(module._forward_pre_hooks) for module in network.modules()] == hooks
    assert sum(len(module._forward_hooks) for module in network.modules()) == 1  # ours
    # Different images leave different features at every stage: none is cut off from the input.
    assert all(bool((stage[0] != stage[1]).any()) for stage in features.split(widths, 1))


@pytest.mark.parametrize(
    ("name", "size", "names", "widths"),
    [
        ("small_resnet", 16, ["stages.0", "stages.1", "stages.2", "fc"], (32, 64, 128, 256)),
        ("resnet18", 32, ["relu", "layer1", "layer2", "layer3", "fc"], (64, 64, 128, 256, 512)),
        ("swin_t", 32, ["features.1", "features.3", "features.5", "head"], (96, 192, 384, 768)),
        (
            "small_vit",
            16,
            [*(f"encoder.layers.encoder_layer_{index}" for index in (1, 2, 3)), "heads.head"],
            (128, 128, 128, 128),
        ),
        (
            "vit_b_32",
            32,
            [*(f"encoder.layers.encoder_layer_{index}" for index in (2, 5, 8)), "heads.head"],
            (768, 768, 768, 768),
        ),
    ],
)
def test_stages_are_pooled_outputs(name, size, names, widths):
    network = build_network(NetworkConfig(name, size), 3).eval()
    assert stage_names(network) == names
    outputs = {}
    for stage in names[:-1]:
        network.get_submodule(stage).register_forward_hook(
            lambda _m, _i, out, stage=stage: outputs.update({stage: out})
        )
    with torch.no_grad():
        features, _, found = stages_and_logits(network, images(size))
    assert found == widths
    positions = {"swin_t": (1, 2), "vit_b_32": (1,), "small_vit": (1,)}.get(name, (2, 3))
    for stage, part in zip(names, features.split(widths, 1), strict=True):
        if stage in outputs:
            torch.testing.assert_close(part, outputs[stage].mean(positions), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "names", "widths"),
    [
        ("swin_tiny_patch4_window7_224", {"window_size": 2}, ["layers.0", "layers.1", "layers.2"], (16, 32, 64, 128)),
        ("swinv2_tiny_window8_256", {"window_size": 2}, ["layers.0", "layers.1", "layers.2"], (16, 32, 64, 128)),
        ("mambaout_femto", {}, ["stages.0", "stages.1", "stages.2"], (16, 32, 64, 512)),
        ("convnext_atto", {}, ["stages.0", "stages.1", "stages.2"], (16, 32, 64, 128)),
    ],
)
@pytest.mark.parametrize("image", [(64, 64), (64, 32)])
def test_channels_are_found_wherever_they_are(name, options, names, widths, image):
    """The first stage's maps are as high and as wide as they have channels: there timm's word decides."""
    timm = pytest.importorskip("timm")
    dims = {"embed_dim": 16, "img_size": image, "num_heads": (2, 2, 4, 8), **options} if options else {"dims": DIMS}
    network = timm.create_model(name, depths=(1, 1, 3, 1), num_classes=3, **dims).eval()
    assert stage_names(network)[:-1] == names
    outputs = {}
    for stage in names:
        network.get_submodule(stage).register_forward_hook(lambda _m, _i, out, s=stage: outputs.update({s: out}))
    with torch.no_grad():
        features, _, found = stages_and_logits(network, torch.randn(2, 3, *image))
    assert found == widths
    positions = (2, 3) if name == "convnext_atto" else (1, 2)
    for stage, part in zip(names, features.split(widths, 1), strict=False):
        torch.testing.assert_close(part, outputs[stage].mean(positions), rtol=0, atol=0)


def convolutions(conv, norm, *strides):
    def stage(channels, stride):
        return nn.Sequential(conv(*channels, 3, stride, 1), norm(channels[1]), nn.ReLU())

    body = [stage(*each) for each in zip([(1, 16), (16, 24), (24, 32)], strides, strict=True)]
    network = nn.Sequential(*body, nn.Flatten(2), nn.Identity())
    network.add_module("mean", Mean())
    network.add_module("head", nn.Linear(32, 3))
    network.stage_names = ["0", "1"]
    return network.eval()


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(2)


@pytest.mark.parametrize("shape", [(64, 40), (64, 16), (64, 96), (16, 16), (256, 24)])
def test_maps_of_any_strides_are_pooled_over_positions(shape):
    network, inputs = convolutions(nn.Conv2d, nn.BatchNorm2d, (4, 1), (4, 1), 2), torch.randn(2, 1, *shape)
    with torch.no_grad():
        features, _, widths = stages_and_logits(network, inputs)
        first = network[0](inputs)
    assert widths == (16, 24, 32)
    torch.testing.assert_close(features[:, :16], first.mean((2, 3)))


@pytest.mark.parametrize("length", [16, 24, 62, 128])
def test_sequences_of_convolutions_are_pooled_over_positions(length):
    network, inputs = convolutions(nn.Conv1d, nn.BatchNorm1d, 1, 2, 2), torch.randn(2, 1, length)
    with torch.no_grad():
        features, _, widths = stages_and_logits(network, inputs)
        first = network[0](inputs)
    assert widths == (16, 24, 32)
    torch.testing.assert_close(features[:, :16], first.mean(2))


class Beside(nn.Module):
    """Convolutions side by side, as in DenseNet: their sum of channels is in no layer."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Conv2d(1, width, 1) for width in (8, 24, 32)])

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], 1)


@pytest.mark.parametrize("side", [24, 32, 48])
def test_convolutions_side_by_side_have_their_channels_first(side):
    network = nn.Sequential(Beside(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))
    network.stage_names = ["0"]
    assert stages_and_logits(network, torch.randn(2, 1, side, side))[2] == (64, 64)


class Last(nn.Module):
    """A convolution whose channels are moved last, as the patches of transformers are."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x).movedim(1, -1)


@pytest.mark.parametrize(("conv", "shape"), [(nn.Conv1d, (48,)), (nn.Conv2d, (12, 12)), (nn.Conv2d, (24, 10))])
def test_channels_that_a_convolution_s_stage_moves_are_last(conv, shape):
    network = nn.Sequential(Last(conv(1, 16, 1)), nn.Flatten(1, -2), nn.AdaptiveAvgPool2d((1, 16)), nn.Flatten())
    network.append(nn.Linear(16, 3))
    network.stage_names = ["0"]
    assert stages_and_logits(network, torch.randn(2, 1, *shape))[2] == (16, 16)


class Early(nn.Module):
    """Registers its dropout before the layer that it follows, as timm's VOLO."""

    def __init__(self):
        super().__init__()
        self.stage_names = ["drop"]
        self.stem, self.drop, self.down = nn.Conv2d(1, 8, 1), nn.Dropout(), Last(nn.Conv2d(8, 16, 2, 2))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.drop(self.down(self.stem(x))).mean((1, 2)))


@pytest.mark.parametrize("size", [4, 8, 64])
def test_a_stage_without_layers_asks_the_one_before_only_where_that_fits(size):
    assert stages_and_logits(Early(), torch.randn(2, 1, size, size))[2] == (16, 16)


def test_the_layers_of_an_mlp_inside_are_no_stages():
    transformers = pytest.importorskip("transformers")
    small = {"image_size": 32, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4}
    network = transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**small)).eval()
    assert stage_names(network) == ["swinv2.encoder.layers.0", "classifier"]


class TimeMajor(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage_names = ["body"]
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):  # [B, T, 4]
        return self.head(self.body(x.transpose(0, 1)).mean(0))


@pytest.mark.parametrize("tokens", [2, 5, 7])
def test_tokens_before_samples_are_refused_whatever_their_number(tokens):
    with pytest.raises(StateError, match=rf"stage 'body' returns \[{tokens}, \d, 4\], expected .*'stage_names'"):
        stages_and_logits(TimeMajor(), torch.randn(5, tokens, 4))


class Own(nn.Module):
    """Names its stages itself."""

    def __init__(self, names):
        super().__init__()
        self.stage_names = names
        self.first, self.second, self.unused, self.fc = (nn.Linear(4, width) for width in (4, 4, 4, 3))

    def forward(self, x):
        return self.fc(self.second(self.second(self.first(x))))


def test_a_network_may_name_its_own():
    network, inputs = Own(["first"]), torch.randn(5, 4)
    assert stage_names(network) == ["first", "fc"]
    features, _, widths = stages_and_logits(network, inputs)
    assert widths == (4, 4)
    assert torch.equal(features[:, :4], network.first(inputs))


@pytest.mark.parametrize(("name", "times"), [("second", 2), ("unused", 0)])
def test_a_stage_that_does_not_run_once_is_named(name, times):
    network = Own([name])
    with pytest.raises(StateError, match=f"stage '{name}' of Own ran {times} times in one pass.*'stage_names'"):
        stages_and_logits(network, torch.randn(5, 4))
    assert not any(module._forward_hooks for module in network.modules())


def test_an_output_that_cannot_be_pooled_is_named():
    network = nn.Sequential(nn.Unflatten(1, (1, 1, 1, 4)), nn.Flatten(), nn.Linear(4, 3))
    network.stage_names = ["0"]
    with pytest.raises(StateError, match=r"stage '0' returns \[5, 1, 1, 1, 4\], expected \[B, C, H, W\]"):
        stages_and_logits(network, torch.randn(5, 4))


def test_a_bare_head_is_one_stage():
    inputs = torch.randn(5, 4)
    features, _, widths = stages_and_logits(nn.Linear(4, 3), inputs)
    assert torch.equal(features, inputs)
    assert widths == (4,)
