"""One forward pass of any network: its logits, and the features that decoders read, of the head or of all stages."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torchvision.models.swin_transformer import PatchMerging, PatchMergingV2, SwinTransformerBlock

from coin.core.batches import Batch, size_of, take, tensors_in
from coin.errors import ConfigurationError, StateError
from coin.networks.heads import features_and_logits, head_name

_CHANNELS_LAST = (PatchMerging, PatchMergingV2, SwinTransformerBlock)
_CHANNELS_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)
_SEQUENCES = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d)
_WIDTHS: dict[Any, str] = {
    _ConvNd: "out_channels",
    nn.Linear: "out_features",
    _NormBase: "num_features",
    nn.GroupNorm: "num_channels",
    nn.LayerNorm: "normalized_shape",
    nn.Embedding: "embedding_dim",
}
_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_ADVICE = "name the stages in an attribute 'stage_names'"


class Run(NamedTuple):
    """What one network answers: features ``[B, F]``, logits ``[B, C]``, and the widths of its stages if asked for."""

    features: Tensor
    logits: Tensor
    widths: tuple[int, ...] | None = None


def run_network(network: nn.Module, inputs: Batch, features: bool, stages: bool = False) -> Run:
    """Run a network once; F is 0 unless its features are wanted, the penultimate ones or those of all stages."""
    if features:
        found = Run(*(stages_and_logits if stages else features_and_logits)(network, inputs))
    else:
        logits = network(inputs)
        found = Run(logits[:, :0], logits)
    return found._replace(features=full_precision(found.features), logits=full_precision(found.logits))


def full_precision(values: Tensor) -> Tensor:
    """Return values that autocast left in 16 bits as float32, in which answers are compared, and others as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def common_widths(runs: Sequence[Run]) -> tuple[int, ...] | None:
    """Return the widths of all networks' stages, None where only the penultimate features are wanted."""
    first, *others = dict.fromkeys(run.widths for run in runs)
    if others:
        told = f"found networks with stages of widths {first} and {others[0]}"
        raise ConfigurationError(f"{told}, expected one architecture; use the last features")
    return first


def stage_names(network: nn.Module) -> list[str]:
    """Return the dotted names of the modules whose outputs are the network's stages, and last the head's name.

    The last stage is the head's input. A network is read as the chain of its blocks: its children in the order of
    registration, with `nn.Sequential` and `nn.ModuleList` opened up. A stage ends before every block that lowers the
    resolution (one with a stride, or torchvision's patch merging). Where no block does but the first, the stages are
    those of timm's ``feature_info`` if they differ in resolution; else, as for a vision transformer, the network is cut
    into four along its longest list of blocks. A network where this goes wrong names its stages itself in an attribute
    ``stage_names: list[str]``, without the head.
    """
    head = head_name(network)
    own = getattr(network, "stage_names", None)
    if own is not None:
        return [*own, head]
    chain = list(_blocks(network))
    last = next((place for place, (name, _) in enumerate(chain) if _is_within(head, name)), len(chain))
    ends = [name for (name, _), (_, following) in pairwise(chain[: last + 1]) if _lowers_resolution(following)]
    return [*(_outermost(network, name) for name in ends or _told(network) or _parts(network, head)), head]


def stages_and_logits(network: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Run a network once; return its stages' features ``[B, F]``, its logits ``[B, C]``, and the widths of the stages.

    The features stand side by side; maps and sequences are averaged over positions, the class token among them; of a
    tuple the first is read. The last stage is what `features_and_logits` returns.
    """
    pooled: dict[str, list[Tensor]] = {name: [] for name in stage_names(network)[:-1]}
    samples, square = size_of(inputs), False
    ratio = next((each.shape[-2] / each.shape[-1] for each in tensors_in(inputs) if each.ndim == 4), 1.0)
    told = getattr(network, "output_fmt", None) == "NHWC"  # by timm
    with ExitStack() as hooks:
        for name in pooled:

            def keep(module: nn.Module, _: tuple[Tensor, ...], output: object, name: str = name) -> None:
                nonlocal square
                found = output[0] if isinstance(output, tuple) and output else output
                if not isinstance(found, Tensor) or not 2 <= found.ndim <= 4 or len(found) != samples:
                    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                    expected = f"expected [B, C, H, W], [B, T, C] or [B, C]; {_ADVICE}"
                    raise StateError(f"the stage '{name}' returns {shape}, {expected}")
                square |= found.ndim == 3 and found.shape[1] == samples > 1
                if found.ndim > 2:
                    axes, is_told = found.shape[1:], told or _is_channels_last(module)
                    last = _channels_are_last(axes, _layers(network, module, axes), is_told, ratio)
                    found = found.mean(tuple(range(1, found.ndim - 1) if last else range(2, found.ndim)))
                pooled[name].append(found)

            hooks.enter_context(network.get_submodule(name).register_forward_hook(keep))
        last, logits = features_and_logits(network, inputs)
    if square:  # as many tokens as samples: of [T, B, C] a single sample is refused
        stages_and_logits(network, take(inputs, slice(0, 1)))
    for name, outputs in pooled.items():
        if len(outputs) != 1:
            told = f"the stage '{name}' of {type(network).__name__} ran {len(outputs)} times in one pass"
            raise StateError(f"{told}, expected once; {_ADVICE}")
    features = [*(outputs[0] for outputs in pooled.values()), last]
    return torch.cat(features, 1), logits, tuple(feature.shape[1] for feature in features)


def _blocks(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks that run one after the other, by name."""
    if name and not isinstance(module, nn.Sequential | nn.ModuleList):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _blocks(child, f"{name}.{child_name}" if name else child_name)


def _lowers_resolution(block: nn.Module) -> bool:
    strides = [module.stride for module in block.modules() if isinstance(module, _STRIDED)]
    merges = any(isinstance(module, PatchMerging | PatchMergingV2) for module in block.modules())
    return merges or any(max(stride if isinstance(stride, tuple) else (stride,)) > 1 for stride in strides)


def _told(network: nn.Module) -> list[str]:
    """Return the modules but the last of timm's ``feature_info``, if they are there and of several resolutions."""
    info: Any = getattr(network, "feature_info", None)
    stages = info if isinstance(info, list) else []
    names = list(dict.fromkeys(stage["module"] for stage in stages))
    several = len({stage["reduction"] for stage in stages}) == len(names) > 1
    return names[:-1] if several and set(names) <= dict(network.named_modules()).keys() else []


def _parts(network: nn.Module, head: str) -> list[str]:
    """Return the ends of all parts but the last when the longest list of blocks, of one type first, is cut in four."""

    def rank(blocks: dict[str, nn.Module]) -> tuple[bool, int]:
        return len(blocks) > 1 == len({type(block) for block in blocks.values()}), len(blocks)

    lists = [
        {f"{name}.{child}" if name else child: block for child, block in module.named_children()}
        for name, module in network.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        and not any(isinstance(block, nn.ModuleList) for block in module)  # which is never called
    ]
    inner = [{name: block for name, block in blocks.items() if not _is_within(head, name)} for blocks in lists]
    best: dict[str, nn.Module] = max(inner, key=rank, default={})
    longest = list(best)
    parts = min(4, len(longest))
    return [longest[round(part * len(longest) / parts) - 1] for part in range(1, parts)]


def _outermost(network: nn.Module, name: str) -> str:
    """Return the outermost `nn.Sequential` that ends with a block, and so has its output."""
    parent, _, child = name.rpartition(".")
    container = network.get_submodule(parent)
    ends = parent and isinstance(container, nn.Sequential) and child == list(container._modules)[-1]
    return _outermost(network, parent) if ends else name


def _is_within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _is_channels_last(stage: nn.Module) -> bool:
    """Return whether the layer that a stage's output is of is one of torchvision's with the channels last."""
    while isinstance(stage, nn.Sequential) and len(stage):
        stage = stage[-1]
    return isinstance(stage, _CHANNELS_LAST)


def _layers(network: nn.Module, stage: nn.Module, shape: Sequence[int]) -> list[nn.Module]:
    """Return the layers of a stage that tell of channels; where it has none, as an activation, the one before it."""
    if inside := [module for module in stage.modules() if _width(module)]:
        return inside
    before = [module for module in takewhile(lambda module: module is not stage, network.modules()) if _width(module)]
    return [layer for layer in before[-1:] if _width(layer) in (shape[0], shape[-1])]


def _width(layer: nn.Module) -> int:
    """Return a layer's number of channels, 0 of what does not tell."""
    name = next((name for kinds, name in _WIDTHS.items() if isinstance(layer, kinds)), None)
    found = getattr(layer, name) if name else 0
    return int(found[-1] if isinstance(found, tuple) else found)


def _channels_are_last(shape: Sequence[int], layers: Sequence[nn.Module], told: bool, ratio: float) -> bool:
    """Return whether a stage's outputs ``[B, *shape]`` have their channels last, not as the first axis after B.

    Maps that are `told` to have them last do. Else the last of the layers with as many channels as one of the two axes
    says which. If none says, a map's axes of positions have the image's ratio of height to width, and else channels are
    first in a map, last in a sequence. After convolutions and normalisations alone they are first, unless the layers,
    and in a map the ratio too, say last: of several convolutions side by side the sum is in no layer.
    """
    first, last = shape[0], shape[-1]
    if told and len(shape) == 3:
        return True
    widths = [width for width in map(_width, layers) if first != last and width in (first, last)]
    said = widths[-1] == last if widths else None
    alone = bool(layers) and all(isinstance(layer, _CHANNELS_FIRST) for layer in layers)
    if len(shape) == 2:
        return said if said is not None else not (alone and any(isinstance(layer, _SEQUENCES) for layer in layers))
    height_first, height_second = (abs(math.log(a / b / ratio)) for a, b in pairwise(shape))
    likely = height_first < height_second
    return likely and bool(said) if alone else likely if said is None else said
