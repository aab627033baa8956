"""Find out, before trusting a layer rule, where the samples lie in the input of every ruled call."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coin.errors import DataError
from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call


@dataclass(frozen=True)
class Layout:
    """What a probe found.

    Attributes:
        rows: Parameter name → k, the leading rows that a sample has in the input of the parameter's one ruled call.
        activations: Floats per sample in the inputs of all watched calls together.
        widest: Floats per sample in the largest of those inputs.
        classes: C.
    """

    rows: Mapping[str, int]
    activations: int
    widest: int
    classes: int


@dataclass(frozen=True)
class _Seen:
    names: dict[str, str]
    size: int
    rows: int
    changed: Tensor | None
    """For every leading row of the input, whether it feels the changed sample; None if it cannot by nature."""


def probe(network: nn.Module, sample: Tensor, copies: int, parameters: Mapping[str, Tensor]) -> Layout:
    """Find, for each parameter that a layer rule may answer for, the leading rows k that a sample has at its call.

    A rule squares per sample, so it must know which rows of its input [B·k, …] belong to one. The shape does not tell:
    [T, B, C] with T = B looks like [B, T, C]. So the network runs on copies of a sample of which the second is changed:
    exactly the rows k … 2k − 1 must feel it. A parameter whose calls fail this, or that is called more than once, is
    left to the general route.

    Args:
        network: In eval mode.
        sample: One sample [1, …]; changed to NaN, which passes through every operation, or to other tokens.
        copies: B ≥ 3. A number that the pass itself does not use, so that a parameter that is expanded to B rows shows
            whether it follows the samples.
        parameters: The trainable parameters.

    Raises:
        DataError: The network's output is not [B, C].
    """
    with torch.no_grad():
        calls, output = _calls(network, sample, copies, parameters)
    if output.ndim != 2 or len(output) != copies:
        raise DataError(
            f"the network's output is {list(output.shape)} for {copies} samples, expected logits [{copies}, C]"
        )
    times = Counter(name for seen in calls for name in seen.names.values())
    rows: dict[str, int] = {}
    for seen in calls:
        k, odd = divmod(seen.rows, copies)
        fits = not odd and k > 0 and all(times[name] == 1 for name in seen.names.values())
        if fits and seen.changed is None:
            fits = k == 1
        elif fits and seen.changed is not None:
            felt = seen.changed.view(copies, k).any(1).tolist()
            fits = felt == [place == 1 for place in range(copies)]
        if fits:
            rows.update(dict.fromkeys(seen.names.values(), k))
    sizes = [seen.size // copies for seen in calls] or [sample.numel()]
    return Layout(rows, sum(sizes), max(sizes), output.shape[1])


def _calls(
    network: nn.Module, sample: Tensor, copies: int, parameters: Mapping[str, Tensor]
) -> tuple[list[_Seen], Tensor]:
    """Return the ruled calls of a run on copies of a sample, the second one changed, and its output."""
    seen: list[_Seen] = []
    before: list[Tensor] = []

    def remember(call: Call, names: dict[str, str], source: Tensor | None) -> None:
        before.append(call.inputs.clone())

    def visit(call: Call, names: dict[str, str], source: Tensor | None) -> None:
        x, changed = call.inputs, None
        if call.from_samples and sample.is_floating_point():
            # A sum is NaN if and only if a term is (infinities of both signs aside, which only cost speed).
            changed = x.reshape(len(x), -1).sum(1).isnan()
        elif call.from_samples:
            unchanged = before[len(seen)] if len(seen) < len(before) else x
            changed = (x != unchanged).reshape(len(x), -1).any(1) if x.shape == unchanged.shape else x.new_ones(len(x))
        seen.append(_Seen(names, x.numel(), len(x), changed))

    if sample.is_floating_point():
        other = torch.full_like(sample, torch.nan)
    else:
        other = sample.max() + sample.min() - sample
        with Interceptor(parameters, remember):
            network(torch.cat([sample] * copies))
    with Interceptor(parameters, visit):
        output = network(torch.cat([other if place == 1 else sample for place in range(copies)]))
    return seen, output
