"""A small residual network made for 32×32 images: the quickstart's architecture."""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from coin.errors import ConfigurationError


class SmallResNet(nn.Module):
    """A ResNet of eight basic blocks (2-2-2-2, widths 32 to 256) behind a 3×3 stride-2 stem; 2.8 M parameters.

    The classifier is called ``fc``, as in torchvision's ResNets. Initialised as there: He et al., *Delving Deep into
    Rectifiers*, 2015.

    Args:
        num_classes: The number of logits.
        width: The channels of the first stage; each later stage doubles them.

    Raises:
        ConfigurationError: `width` is below 1.
    """

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        if width < 1:
            raise ConfigurationError(f"found width={width}, expected at least 1 channel")
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        stages = []
        channels = width
        for index in range(4):
            out = width * 2**index
            stages.append(
                nn.Sequential(_block(channels, out, stride=1 if index == 0 else 2), _block(out, out, stride=1))
            )
            channels = out
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]`` of images ``[B, 3, H, W]``."""
        features = self.pool(self.stages(self.stem(images)))
        return self.fc(torch.flatten(features, 1))  # type: ignore[no-any-return]


def _block(channels: int, out: int, *, stride: int) -> BasicBlock:
    shortcut = None
    if stride != 1 or channels != out:
        shortcut = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))
    return BasicBlock(channels, out, stride, shortcut)
