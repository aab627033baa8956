"""Files of weights by their names, where the name of pretrained weights would do too."""

import os

_ENDS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def names_a_file(weights: str) -> bool:
    """Whether weights are given by a file, and not by a name such as ``IMAGENET1K_V2``."""
    return weights.endswith(_ENDS) or os.sep in weights
