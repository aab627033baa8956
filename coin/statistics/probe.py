"""Find out, before trusting a layer rule, where the samples lie in the input of every ruled call."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call


@dataclass(frozen=True)
class _Seen:
    names: dict[str, str]
    changed: Tensor
    """For every leading row of the input, whether it depends on the changed sample; empty if on none by nature."""
    rows: int


def rows_per_sample(network: nn.Module, sample: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Return, for each parameter that a layer rule may answer for, the leading rows k that a sample has at its call.

    A rule squares per sample, so it must know which rows of its input [B·k, …] belong to one. The shape does not tell:
    [T, B, C] with T = B looks like [B, T, C]. So the network runs on two samples with the first one changed, and on
    three with the last one changed: exactly the first k rows of 2k, and the last k of 3k, must feel it. A parameter
    whose calls fail this, or that is called more than once, is left to the general route.

    Args:
        network: In eval mode.
        sample: One sample [1, …]; changed to NaN, which passes through every operation, or to other tokens.
        parameters: The trainable parameters.
    """
    with torch.no_grad():
        first = _calls(network, sample, (True, False), parameters)
        last = _calls(network, sample, (False, False, True), parameters)
    times = Counter(name for seen in first for name in seen.names.values())
    found: dict[str, int] = {}
    if [seen.names for seen in first] != [seen.names for seen in last]:
        return found
    for two, three in zip(first, last, strict=True):
        rows = two.rows // 2
        fits = rows > 0 and (two.rows, three.rows) == (2 * rows, 3 * rows)
        if fits and two.changed.numel():
            fits = bool(two.changed[:rows].any()) and not bool(two.changed[rows:].any())
            fits &= bool(three.changed[2 * rows :].any()) and not bool(three.changed[: 2 * rows].any())
        elif rows != 1:
            fits = False
        if fits and all(times[name] == 1 for name in two.names.values()):
            found.update(dict.fromkeys(two.names.values(), rows))
    return found


def _calls(
    network: nn.Module, sample: Tensor, changes: tuple[bool, ...], parameters: Mapping[str, Tensor]
) -> list[_Seen]:
    """Return the ruled calls of a run on len(changes) copies of a sample, some of them changed."""
    seen: list[_Seen] = []
    before: list[Tensor] = []

    def visit(call: Call, names: dict[str, str], source: Tensor | None) -> None:
        x = call.inputs
        if not call.from_samples:
            changed = x.new_empty(0, dtype=torch.bool)
        elif sample.is_floating_point():
            changed = x.isnan().reshape(len(x), -1).any(1)
        else:
            changed = (x != before[len(seen)]).reshape(len(x), -1).any(1)
        seen.append(_Seen(names, changed, len(x)))

    def remember(call: Call, names: dict[str, str], source: Tensor | None) -> None:
        before.append(call.inputs.clone())

    if sample.is_floating_point():
        other = torch.full_like(sample, torch.nan)
    else:
        other = sample.max() + sample.min() - sample
        with Interceptor(parameters, remember):
            network(torch.cat([sample] * len(changes)))
    with Interceptor(parameters, visit):
        network(torch.cat([other if change else sample for change in changes]))
    return seen
