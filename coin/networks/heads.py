"""The classifier head of any network: found by name, replaced, padded, and read together with its input."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin.errors import StateError
from coin.state import State


def head_name(network: nn.Module) -> str:
    """Return the dotted name of the classifier head.

    The head is the last `nn.Linear` in the order of registration, or, where a network has none (SqueezeNet), the
    last `nn.Conv2d`. A network whose head is elsewhere names it itself in an attribute ``head_name: str``.

    Raises:
        StateError: The network has neither.
    """
    own = getattr(network, "head_name", None)
    if isinstance(own, str):
        return own
    for kind in (nn.Linear, nn.Conv2d):
        names = [name for name, module in network.named_modules() if isinstance(module, kind)]
        if names:
            return str(names[-1])
    raise StateError(
        f"found no Linear or Conv2d layer in {type(network).__name__}, expected a classifier head; "
        "name it in an attribute 'head_name'"
    )


def replace_head(network: nn.Module, num_classes: int) -> None:
    """Put a freshly initialised head of `num_classes` outputs in the place of the old one."""
    name = head_name(network)
    old = network.get_submodule(name)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
        nn.init.normal_(new.weight, std=0.01)
    elif isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1, bias=old.bias is not None)
        nn.init.normal_(new.weight, std=0.01)
    else:
        raise StateError(f"the head '{name}' is a {type(old).__name__}, expected a Linear or a Conv2d layer")
    if isinstance(new.bias, Tensor):
        nn.init.zeros_(new.bias)
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)
    if hasattr(network, "num_classes"):  # SqueezeNet reshapes by it
        network.num_classes = num_classes  # type: ignore[assignment]


def pad_head(
    state: State, head: str, num_outputs: int, *, fill: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return `state` with the head's rows padded to `num_outputs`, so that tasks of unequal class counts merge.

    Args:
        state: A network's tensors, or a statistic with the same names.
        head: The head's dotted name.
        num_outputs: The number of rows after padding.
        fill: The value of a padded row, by tensor name; zeros where absent (a padded logit is then zero).

    Raises:
        StateError: The head already has more rows.
    """
    return {**state, **padded_rows(state, head, num_outputs, fill=fill)}


def padded_rows(
    state: State, head: str, num_outputs: int, *, fill: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors alone that `pad_head` replaces; none where the head is wide enough."""
    padded = {}
    for key in (f"{head}.weight", f"{head}.bias"):
        if key not in state:
            continue
        tensor = state[key]
        missing = num_outputs - tensor.shape[0]
        if missing < 0:
            raise StateError(f"'{key}' has {tensor.shape[0]} outputs, expected at most {num_outputs}")
        if missing:
            row = torch.zeros_like(tensor[:1]) if fill is None or key not in fill else fill[key].to(tensor)[None]
            padded[key] = torch.cat([tensor, row.expand(missing, *tensor.shape[1:])])
    return padded


def pad_logits(logits: Tensor, num_outputs: int) -> Tensor:
    """Return logits ``[..., C]`` padded with zeros to ``[..., num_outputs]``.

    Raises:
        StateError: There are more logits already.
    """
    if logits.shape[-1] > num_outputs:
        raise StateError(
            f"found {logits.shape[-1]} logits to pad to {num_outputs}, expected at most {num_outputs}; give the "
            "largest class count"
        )
    return F.pad(logits, (0, num_outputs - logits.shape[-1]))


def features_and_logits(network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Run a network once and return its penultimate features beside its logits.

    Args:
        network: Any network with a head that `head_name` finds.
        inputs: ``[B, ...]``.

    Returns:
        The features ``[B, F]``, which are the head's input (averaged over positions where it has any), and the
        logits ``[B, C]``.
    """
    captured: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        captured.append(arguments[0])

    handle = network.get_submodule(head_name(network)).register_forward_pre_hook(keep)
    try:
        logits = network(inputs)
    finally:
        handle.remove()
    if len(captured) != 1:
        raise StateError(f"the head of {type(network).__name__} ran {len(captured)} times in one pass, expected once")
    features = captured[0]
    if isinstance(network.get_submodule(head_name(network)), nn.Conv2d):
        features = features.flatten(2).mean(2)
    elif features.ndim > 2:
        features = features.flatten(1, -2).mean(1)
    return features, logits
