"""The Fisher diagonal of whole architectures, in float64 per tensor, against one backward per sample and output."""

import pytest
import torch
import torchvision
from dense import CLASSES, fisher_by_autograd
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from coin.networks.small import SmallViT
from coin.statistics import fisher_diagonal, fisher_sums

ARCHITECTURES = {  # the side of images, and the network
    "resnet18": (32, lambda: torchvision.models.resnet18(num_classes=CLASSES)),
    "resnet50": (32, lambda: torchvision.models.resnet50(num_classes=CLASSES)),
    "mobilenet_v3_small": (32, lambda: torchvision.models.mobilenet_v3_small(num_classes=CLASSES)),
    "efficientnet_b0": (32, lambda: torchvision.models.efficientnet_b0(num_classes=CLASSES)),
    "convnext_tiny": (32, lambda: torchvision.models.convnext_tiny(num_classes=CLASSES)),
    "vit": (32, lambda: VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES)),
    "small_vit": (32, lambda: SmallViT(CLASSES, 32, 8, depth=2, heads=2, width=16, mlp_width=32)),
    "swin": (32, lambda: SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=CLASSES)),
    "swin of several windows": (
        64,
        lambda: SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=CLASSES),
    ),
    "resnet of larger maps": (64, lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)),
}
SLOW = {"resnet50", "efficientnet_b0", "convnext_tiny"}
MARKED = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ARCHITECTURES
]


def network_of(name, samples):
    """An architecture with random numbers in every tensor, and images: fresh ones are zero or one in places."""
    torch.manual_seed(1)
    side, make = ARCHITECTURES[name]
    network = make().double().eval()
    for parameter in network.parameters():
        if parameter.ndim == 1 or parameter.flatten(1).std() < 1e-3:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer += 0.1 * torch.rand_like(buffer)
    return network, torch.randn(samples, 3, side, side).double()


def assert_equal_per_tensor(found, expected):
    """Compare what is of very different sizes: relative to the largest number of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        assert error <= 1e-10 * value.abs().max(), name


@pytest.mark.parametrize("name", MARKED)
def test_equals_autograd(name):
    network, inputs = network_of(name, 3)
    expected = fisher_by_autograd(network, inputs)
    assert any(value.any() for value in expected.values())
    assert_equal_per_tensor(fisher_diagonal(network, [inputs[:2], inputs[2:]]), expected)


def test_memory_and_batch_sizes_do_not_change_the_numbers():
    network, inputs = network_of("resnet18", 7)
    whole = fisher_sums(network, [inputs])
    sizes = []
    network.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    tight = fisher_sums(network, [inputs[:5], inputs[5:]], memory_mib=1)
    assert sizes.count(1) >= 7  # one sample at a time
    assert tight.count == whole.count == 7
    assert tight.passes == whole.passes == 7 * (1 + 2 * CLASSES)
    assert_equal_per_tensor(dict(tight.values), dict(whole.values))
