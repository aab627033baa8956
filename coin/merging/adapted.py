"""One body and N adapters as a network that answers as any of its experts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coin.core.batches import clone, tensors_in
from coin.errors import StateError
from coin.files.tensors import State
from coin.networks.adapters import Adapter, Change, split_adapters
from coin.networks.heads import head_name
from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call
from coin.statistics.rules.convolution import ConvolutionCall
from coin.statistics.rules.linear import LinearCall


class Adapted(nn.Module):
    """One body and N adapters; it answers as the experts that `answering` names, for a batch of mixed experts at once.

    Every unit runs once on the whole batch; what the adapters add is computed for each expert's samples. Logits are
    those of the body's head, on features that are the expert's.

    >>> networks = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)) for _ in experts]
    >>> adapted = coin.fit_adapters(networks[0], networks, inputs, rank=4)
    >>> with coin.answering([adapted], torch.tensor([0, 2])):
    ...     adapted(torch.randn(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, body: nn.Module, adapters: Sequence[Adapter]) -> None:
        super().__init__()
        self.body, self.adapters = body, nn.ModuleList(adapters)
        self.head_name = f"body.{head_name(body)}"
        self._experts: int | Tensor | None = None

    def network(self, expert: int, head: nn.Module | None = None) -> nn.Module:
        """Return a plain network that answers as an expert; see `Adapter.applied_to`."""
        adapter = self.adapters[expert]
        assert isinstance(adapter, Adapter)
        return adapter.applied_to(self.body, head)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the body makes of inputs ``[B, …]`` with the adapters that `answering` names."""
        if self._experts is None:
            raise StateError("found a body with adapters, expected to be told whose answer it gives; use answering")
        count = len(tensors_in((inputs, named))[0])
        experts = torch.as_tensor(self._experts).expand(count).cpu()
        groups = [(expert, (experts == expert).nonzero().flatten()) for expert in sorted({*experts.tolist()})]
        changes: Any = [(expert, self.adapters[expert].changes) for expert, _ in groups]

        def visit(call: Call, names: dict[str, str], function: Any) -> Tensor:
            output: Tensor = function()
            each = {expert: {role: own[name] for role, name in names.items() if name in own} for expert, own in changes}
            if len(groups) == 1 or not any(each.values()):
                return with_change(call, call.inputs, output, next(iter(each.values())))
            leading = torch.arange(len(output) // count)
            rows = [(len(leading) * samples[:, None] + leading).flatten().to(output.device) for _, samples in groups]
            owners = zip(rows, each.values(), strict=True)
            parts = [with_change(call, call.inputs[own], output[own], change) for own, change in owners]
            return torch.cat(parts)[torch.cat(rows).argsort()]

        fast = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # whose projections are no calls that can be seen
            with Interceptor(dict(self.body.named_parameters()), visit):
                return self.body(*inputs, **named)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def with_adapters(network: nn.Module, adapters: Sequence[Adapter]) -> nn.Module:
    """Return a network, as a body if there are adapters."""
    return Adapted(network, adapters) if adapters else network


def adapted_like(network: nn.Module, state: State, count: int) -> nn.Module:
    """Return a copy of a network, as a body with so many experts' adapters if the state is one's."""
    network = clone(network).eval()
    is_body = all(name.startswith(("body.", "adapters.")) for name in state)
    return Adapted(network, split_adapters(state, count)[1]) if is_body else network


def parts_of(network: nn.Module) -> tuple[nn.Module, Sequence[Adapter]]:
    """Return a network's body, which is itself without adapters, and these."""
    if isinstance(network, Adapted):
        return network.body, cast("Sequence[Adapter]", list(network.adapters))
    return network, ()


@contextmanager
def answering(networks: Iterable[nn.Module], experts: int | Tensor | None) -> Iterator[None]:
    """Have networks with adapters answer as an expert, or sample by sample as experts ``[B]``; others are as always.

    >>> with coin.answering(experts, 1):  # no adapters: nothing changes
    ...     experts[0](torch.randn(2, 4)).shape
    torch.Size([2, 3])
    """
    chosen = [each for each in networks if isinstance(each, Adapted)]
    before = [each._experts for each in chosen]
    try:
        for each in chosen:
            each._experts = experts
        yield
    finally:
        for each, old in zip(chosen, before, strict=True):
            each._experts = old


def with_change(call: Call, inputs: Tensor, output: Tensor, change: Mapping[str, Change]) -> Tensor:
    """Return some rows of a call's output with the change of its weight and bias, by role, given its inputs there."""
    weight, bias = change.get("weight", {}), change.get("bias", {})
    if "left" in weight:
        output = output + _low_rank(call, inputs, weight["left"].to(output), weight["right"].to(output))
    if "scale" in weight:
        scale = _along(call, weight["scale"], output)
        kept = 0 if call.bias is None else (1 - scale) * _along(call, call.bias, output)
        output = output * scale + kept
    return output + _along(call, bias["shift"], output) if "shift" in bias else output


def _along(call: Call, values: Tensor, output: Tensor) -> Tensor:
    """Return values [O], one for each of a call's outputs, as they are broadcast over its output [n, …]."""
    values = values.to(output)
    if isinstance(call, ConvolutionCall):
        return values.reshape(-1, *[1] * (output.ndim - 2))
    return values.flatten() if isinstance(call, LinearCall) else values.reshape(call.shape)  # type: ignore[attr-defined]


def _low_rank(call: Call, inputs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return what a call's output gains from left @ right beside its weight."""
    if not isinstance(call, ConvolutionCall):
        down, up = (left.T, right.T) if call.transposed else (right, left)  # type: ignore[attr-defined]
        return F.linear(F.linear(inputs, down), up)
    geometry, dims = call.geometry, inputs.ndim - 2
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    kernel = right.reshape(len(right), -1, *geometry.kernel)
    inner = convolve(inputs, kernel, None, geometry.stride, geometry.padding, geometry.dilation)
    return convolve(inner, left.reshape(*left.shape, *[1] * dims))
