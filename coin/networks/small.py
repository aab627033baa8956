"""Two small networks made for 32×32 images, a residual one, the quickstart's, and a vision transformer."""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, conv1x1
from torchvision.models.vision_transformer import VisionTransformer


class SmallResNet(nn.Module):
    """A ResNet of eight basic blocks (2-2-2-2, widths 32 to 256) behind a 3×3 stride-2 stem; 2.8 M parameters.

    The classifier is called ``fc``, as in torchvision's ResNets. Initialised as there: He et al., *Delving Deep into
    Rectifiers*, 2015.

    Args:
        num_classes: The number of logits.
        width: The channels of the first stage, at least 1; each later stage doubles them.
    """

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        stages = []
        for channels, out in pairwise(widths):
            stages.append(nn.Sequential(_block(channels, out), _block(out, out)))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]`` of images ``[B, 3, H, W]``."""
        pooled = self.pool(self.stages(self.stem(images)))
        return self.fc(pooled.flatten(1))  # type: ignore[no-any-return]


def _block(channels: int, out: int) -> BasicBlock:
    if channels == out:
        return BasicBlock(channels, out)
    downsample = nn.Sequential(conv1x1(channels, out, 2), nn.BatchNorm2d(out))
    return BasicBlock(channels, out, 2, downsample)


class SmallViT(VisionTransformer):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's vision transformer at a size that two CPU cores can train; 0.8 M parameters.

    It has patches of 4 pixels, a class token, learned positions, six blocks of four heads and width 128. The classifier
    is called ``heads.head`` and starts at zero, as in ``vit_b_16``. Every channel of every image is first brought to
    mean 0 and variance 1: tokens would differ mostly by the image's colours, and training stall.

    Args:
        num_classes: The number of logits.
        image_size: Height and width of the images in pixels.
        patch_size: Height and width of a patch in pixels, a divisor of `image_size`.
        depth: The number of blocks.
        heads: Attention heads of a block, a divisor of `width`.
        width: The size of a token.
        mlp_width: The hidden units of a block's perceptron.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        patch_size: int = 4,
        depth: int = 6,
        heads: int = 4,
        width: int = 128,
        mlp_width: int = 256,
    ) -> None:
        super().__init__(
            image_size, patch_size, depth, heads, width, mlp_width, num_classes=num_classes
        )
        # Nearer to a token's scale than torchvision's 0.02: attention tells positions apart from the first step on.
        nn.init.normal_(self.encoder.pos_embedding, std=0.3)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]`` of images ``[B, 3, H, W]``."""
        return super().forward(F.instance_norm(images))  # type: ignore[no-any-return]
