"""One forward pass of any network: its logits, and the features that decoders read, of the head or of all stages."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging, PatchMergingV2, SwinTransformerBlock

from coin.batches import Batch
from coin.errors import ConfigurationError, StateError
from coin.networks.heads import features_and_logits, head_name

_CHANNELS_LAST = (PatchMerging, PatchMergingV2, SwinTransformerBlock)
_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


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
        raise ConfigurationError(
            f"found networks with stages of widths {first} and {others[0]}, expected one architecture; use the last "
            "features"
        )
    return first


def stage_names(network: nn.Module) -> list[str]:
    """Return the dotted names of the modules whose outputs are the network's stages, and last the head's name.

    The last stage is the head's input, all others are outputs. A network is read as the chain of its blocks: its
    children in the order of registration, with `nn.Sequential` and `nn.ModuleList` opened up. A stage ends before
    every block that lowers the resolution (one with a stride, or Swin's patch merging). A network that lowers it at
    most once, as a vision transformer, is cut into four along its longest list of blocks instead. A network where this
    goes wrong names its stages itself in an attribute ``stage_names: list[str]``, without the head.
    """
    head = head_name(network)
    own = getattr(network, "stage_names", None)
    if own is not None:
        return [*own, head]
    chain = []
    for name, block in _blocks(network):
        chain.append((name, block))
        if _is_within(head, name):
            break
    ends = [name for (name, _), (_, following) in pairwise(chain) if _lowers_resolution(following)]
    return [*(_outermost(network, name) for name in ends or _parts(network, head)), head]


def stages_and_logits(network: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Run a network once; return its stages' features ``[B, F]``, its logits ``[B, C]``, and the widths of the stages.

    The features stand side by side; maps are averaged over positions (Swin's have their channels last), sequences over
    all tokens, the class token among them. The last stage is what `features_and_logits` returns.
    """
    pooled: dict[str, list[Tensor]] = {name: [] for name in stage_names(network)[:-1]}
    with ExitStack() as hooks:
        for name in pooled:

            def keep(module: nn.Module, _: tuple[Tensor, ...], output: object, name: str = name) -> None:
                pooled[name].append(_pooled(name, module, output))

            hooks.enter_context(network.get_submodule(name).register_forward_hook(keep))
        last, logits = features_and_logits(network, inputs)
    for name, outputs in pooled.items():
        if len(outputs) != 1:
            raise StateError(
                f"the stage '{name}' of {type(network).__name__} ran {len(outputs)} times in one pass, expected once; "
                "name the stages in an attribute 'stage_names'"
            )
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
    if any(max(stride if isinstance(stride, tuple) else (stride,)) > 1 for stride in strides):
        return True
    return any(isinstance(module, PatchMerging | PatchMergingV2) for module in block.modules())


def _parts(network: nn.Module, head: str) -> list[str]:
    """Return the blocks of the longest list that end all parts but the last, when it is cut into four equal ones."""
    lists = [
        [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        for name, module in network.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
    ]
    longest = max(([name for name in names if not _is_within(head, name)] for names in lists), key=len, default=[])
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


def _pooled(name: str, stage: nn.Module, output: object) -> Tensor:
    """Return a stage's output averaged to ``[B, C]``."""
    if not isinstance(output, Tensor) or not 2 <= output.ndim <= 4:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise StateError(f"the stage '{name}' returns {found}, expected [B, C, H, W], [B, T, C] or [B, C]")
    while isinstance(stage, nn.Sequential) and len(stage):
        stage = stage[-1]  # the layer that the output is of
    positions = {2: (), 3: (1,), 4: (1, 2) if isinstance(stage, _CHANNELS_LAST) else (2, 3)}[output.ndim]
    return output.mean(positions) if positions else output
