"""A batch as a network wants it."""

from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""With which images are normalised, of the channels of images in [0, 1]."""


def as_input(batch: Tensor, network: nn.Module) -> Tensor:
    """Return a batch as an ordinary tensor on the network's device, in its floating-point type.

    Integer inputs (tokens) keep their type. Inference tensors, which autograd refuses, are copied.
    """
    reference = next(network.parameters(), None)
    if reference is not None:
        batch = batch.to(reference.device, reference.dtype if batch.is_floating_point() else batch.dtype)
    return batch.clone() if batch.is_inference() else batch.detach()
