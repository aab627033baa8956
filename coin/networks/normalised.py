"""Images in another normalisation than ImageNet's usual one, for networks that were trained so."""

from collections.abc import Sequence

from torch import Tensor, nn

from coin.batches import IMAGENET_MEAN, IMAGENET_STD


class Renormalised:
    """A hook that gives a network its own normalisation of images, where ours is ImageNet's usual one.

    Args:
        mean: Of the three channels, of images in [0, 1].
        std: Likewise.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.scale = [ours / theirs for ours, theirs in zip(IMAGENET_STD, std, strict=True)]
        self.shift = [(ours - own) / each for ours, own, each in zip(IMAGENET_MEAN, mean, std, strict=True)]

    def __call__(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the inputs in the network's normalisation."""
        images, *others = inputs
        if self.scale == [1, 1, 1] and self.shift == [0, 0, 0]:
            return inputs
        scale, shift = (images.new_tensor(each).view(3, 1, 1) for each in (self.scale, self.shift))
        return (images * scale + shift, *others)
