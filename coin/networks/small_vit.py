"""A small vision transformer made for 32×32 images."""

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer

from coin.errors import ConfigurationError


class SmallViT(VisionTransformer):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's vision transformer at a size that two CPU cores can train; 0.8 M parameters.

    Patches of 4 pixels, a class token, learned positions, six blocks of four heads and width 128. The classifier is
    called ``heads.head`` and starts at zero, as in ``vit_b_16``.

    Every channel of every image is first brought to mean 0 and variance 1, without parameters. Without BatchNorm and
    pretraining, the tokens of coloured images otherwise differ mostly by the image's colours, and training stalls.

    Args:
        num_classes: The number of logits.
        image_size: Height and width of the images in pixels.
        patch_size: Height and width of a patch in pixels, a divisor of `image_size`.
        depth: The number of blocks.
        heads: Attention heads of a block, a divisor of `width`.
        width: The size of a token.
        mlp_width: The hidden units of a block's perceptron.

    Raises:
        ConfigurationError: A size is below 1, or does not divide as it should.
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
        if min(patch_size, depth, heads, width, mlp_width) < 1 or image_size % patch_size or width % heads:
            raise ConfigurationError(
                f"found patch_size={patch_size}, depth={depth}, heads={heads}, width={width}, mlp_width={mlp_width} "
                f"for images of {image_size} pixels, expected numbers of at least 1, patches that divide the images "
                "and heads that divide the width"
            )
        super().__init__(image_size, patch_size, depth, heads, width, mlp_width, num_classes=num_classes)
        # Nearer to a token's scale than torchvision's 0.02: attention tells positions apart from the first step on.
        nn.init.normal_(self.encoder.pos_embedding, std=0.3)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]`` of images ``[B, 3, H, W]``."""
        return super().forward(F.instance_norm(images))  # type: ignore[no-any-return]
