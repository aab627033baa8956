"""The Fisher diagonal of whole architectures, in float64 per tensor, against one backward per sample and output."""

from functools import partial

import pytest
import torch
from dense import CLASSES, fisher_by_autograd
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from coin.networks.small import SmallViT
from coin.statistics import fisher_diagonal, fisher_sums

SMALL = {  # in small: the side of images, the class and its arguments
    "vit": (32, VisionTransformer, 32, 8, 2, 2, 16, 32),
    "small_vit": (32, partial(SmallViT, depth=2, heads=2, width=16, mlp_width=32)),
    "swin": (32, SwinTransformer, [4, 4], 16, [2, 2], [2, 2], [4, 4]),
    "swin of several windows": (64, SwinTransformer, [4, 4], 8, [2], [2], [4, 4]),
    "resnet of larger maps": (64, ResNet, BasicBlock, [1, 1, 1, 1]),
}
SLOW = ["resnet50", "efficientnet_b0", "convnext_tiny"]
ARCHITECTURES = [
    *SMALL,
    "resnet18",
    "mobilenet_v3_small",
    *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW],
]


def network_of(name, samples):
    """An architecture with random numbers in every tensor, and images: fresh ones are zero or one in places."""
    if name in SMALL:
        side, make, *arguments = SMALL[name]
        network = make(*arguments, num_classes=CLASSES)
    else:
        side = 32
        network = get_model(name, num_classes=CLASSES)
    for parameter in network.parameters():
        if parameter.std() < 1e-3:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer += 0.1 * torch.rand_like(buffer)
    return network.double().eval(), torch.randn(samples, 3, side, side).double()


def assert_equal_per_tensor(found, expected):
    """Compare what is of very different sizes: relative to the largest number of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        assert error <= 1e-10 * value.abs().max(), name


@pytest.mark.parametrize("name", ARCHITECTURES)
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
    assert_equal_per_tensor(tight.values, whole.values)
