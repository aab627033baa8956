"""The Fisher diagonal of whole architectures, in float64 per tensor, against one backward per sample and output."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torchvision
from dense import CLASSES, dense_loop
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from coin.networks.small import SmallViT
from coin.statistics import fisher_diagonal, fisher_sums


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights in every tensor: fresh ones are zero or one in places and would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    network = network.double()
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim == 1 or not p.any() or p.flatten(1).std() < 1e-3:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.1 * torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return network


def assert_equal_per_tensor(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=CLASSES),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=CLASSES),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=CLASSES),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=CLASSES),
    "convnext_tiny": lambda: torchvision.models.convnext_tiny(num_classes=CLASSES),
    "vit": lambda: VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES),
    "small_vit": lambda: SmallViT(CLASSES, 32, 8, depth=2, heads=2, width=16, mlp_width=32),
    "swin": lambda: SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=CLASSES),
}


LARGE = ("resnet50", "efficientnet_b0", "convnext_tiny")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in ARCHITECTURES]
)
def test_equals_the_dense_loop(name: str) -> None:
    torch.manual_seed(1)
    network = randomised(ARCHITECTURES[name]())
    inputs = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = dense_loop(network, inputs)
    assert any(value.abs().max() > 0 for value in expected.values())
    assert_equal_per_tensor(fisher_diagonal(network, [inputs[:2], inputs[2:]]), expected)


def test_windows_and_a_larger_map() -> None:
    """Several windows a sample, shifted; and maps on which the direct rule is chosen."""
    torch.manual_seed(2)
    inputs = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    swin = randomised(SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=CLASSES))
    resnet = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    for network in (swin, randomised(resnet)):
        assert_equal_per_tensor(fisher_diagonal(network, [inputs]), dense_loop(network, inputs))


def test_memory_bound_and_batch_sizes_do_not_change_the_numbers() -> None:
    torch.manual_seed(3)
    network = randomised(ARCHITECTURES["resnet18"]())
    inputs = torch.randn(7, 3, 32, 32, dtype=torch.float64)
    whole = fisher_sums(network, [inputs])
    runs: list[int] = []
    network.register_forward_pre_hook(lambda module, arguments: runs.append(len(arguments[0])))
    tight = fisher_sums(network, [inputs[:5], inputs[5:]], memory_mib=1)
    assert runs.count(1) >= 7, "one sample at a time"
    assert tight.count == whole.count == 7
    assert tight.passes == whole.passes == 7 * (1 + 2 * CLASSES)
    assert_equal_per_tensor(dict(tight.values), dict(whole.values), 1e-12)


def test_nothing_of_a_pass_waits_for_the_garbage_collector() -> None:
    network = SmallViT(CLASSES, 32, 8, depth=2, heads=2, width=16, mlp_width=32)
    parameter = weakref.ref(network.get_parameter("heads.head.weight"))
    gc.disable()
    try:
        fisher = weakref.ref(fisher_diagonal(network, [torch.rand(2, 3, 32, 32)])["heads.head.weight"])
        del network
        assert parameter() is fisher() is None
    finally:
        gc.enable()
