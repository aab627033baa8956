"""Record the ruled calls of one forward pass and drive their rules during the backward passes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from coin.errors import StateError
from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call, Site
from coin.statistics.sums import sum_type


class Tape:
    """The ruled calls of a forward pass over B samples.

    Attributes:
        anchor: A scalar on which every ruled output depends; differentiating by it makes autograd visit them all, and
            nothing else.
        cotangents: V, the number of cotangents in the backward pass that is running.
    """

    def __init__(self, samples: int, rows: Mapping[str, int], totals: Mapping[str, Tensor], like: Tensor) -> None:
        self._samples, self._rows, self._totals = samples, rows, totals
        self.anchor = like.new_zeros(()).requires_grad_()
        self.cotangents, self._last = 1, True
        self._calls: list[tuple[Call, dict[str, str], int]] = []
        self._sites: dict[Call, Site] = {}

    def run(self, network: nn.Module, inputs: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the network's output [B, C], with the ruled calls recorded."""
        with Interceptor(parameters, self._visit):
            output: Tensor = network(inputs)
        return output

    def _visit(self, call: Call, names: dict[str, str], source: Tensor | None) -> Tensor | None:
        # The plan says how many leading rows a sample has at this parameter's one call; anything else is not ours.
        if any(self._rows.get(name, 0) * self._samples != call.inputs.shape[0] for name in names.values()):
            return None
        self._calls.append((call, names, call.inputs._version))
        output: Tensor = _RuledCall.apply(  # type: ignore[no-untyped-call]
            self.anchor, source, call, self
        )
        return output

    def close(self, output: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
        """Settle who is responsible for which parameter, before any backward pass.

        Returns:
            The names that the rules must not answer for, because the parameter is called more than once or is also
            used outside a ruled call: their per-sample gradients have to be summed before squaring.

        Raises:
            StateError: The network changed a ruled call's input in place, so that its gradient is gone.
        """
        called: list[str] = []
        for call, names, version in self._calls:
            called.extend(names.values())
            if call.inputs._version != version:
                raise StateError(
                    f"the input of the layer with '{next(iter(names.values()))}' is modified in place after its use, "
                    "so its gradient cannot be had; make that operation out of place (inplace=False)"
                )
        general = {name for name in called if called.count(name) > 1}
        reached = reached_tensors(output)
        general |= {name for name, parameter in parameters.items() if id(parameter) in reached}
        for call, names, _ in self._calls:
            kept = {role: name for role, name in names.items() if name not in general}
            self._sites[call] = Site(self._samples, kept, self._totals)
        return general

    def backward(self, output: Tensor, cotangents: Tensor, *, last: bool) -> None:
        """Run the backward passes of cotangents [V, B, C] at once and let the rules add their squares."""
        if not self._calls or not output.requires_grad:
            return
        self.cotangents, self._last = len(cotangents), last

        def one(cotangent: Tensor) -> Tensor:
            torch.autograd.grad(output, self.anchor, cotangent, retain_graph=not last, allow_unused=True)
            return cotangent

        torch.vmap(one)(cotangents)

    def contract(self, call: Call, g: Tensor, needs_input: bool) -> Tensor:
        """Let a call's rule see the cotangents [V, N, …] of its output; return those of its input, if asked."""
        site = self._sites[call]
        if site.names:
            call.accumulate(g.to(sum_type(g)), site)
            if self._last:
                call.finish(site)
        return call.input_gradient(g) if needs_input else g.new_zeros(())


class _RuledCall(Function):
    """The function itself, with its rule in place of autograd's gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, source: Tensor | None, call: Call, tape: Tape) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.tape = call, tape
        return call.output()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[None, Tensor | None, None, None]:
        if g is None:
            return None, None, None, None
        needed = ctx.needs_input_grad[1]
        gradient = _Contraction.apply(g, ctx.call, ctx.tape, needed)  # type: ignore[no-untyped-call]
        return None, gradient if needed else None, None, None


class _Contraction(Function):
    """Reaches below autograd's batching of cotangents, where all V of them are one tensor."""

    @staticmethod
    def forward(g: Tensor, call: Call, tape: Tape, needed: bool) -> Tensor:
        # Not batched: the same cotangent for every v. The sum of V equal squares and V equal input gradients.
        gradient = tape.contract(call, g.expand(tape.cotangents, *g.shape), needed)
        return gradient[0] if needed else gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], g: Tensor, call: Call, tape: Tape, needed: bool
    ) -> tuple[Tensor, int | None]:
        gradient = tape.contract(call, g.movedim(in_dims[0] or 0, 0), needed)
        return gradient, 0 if needed else None


def reached_tensors(output: Tensor) -> set[int]:
    """Return the ids of the leaf tensors in the graph behind an output."""
    found: set[int] = set()
    seen: set[Any] = set()
    stack: list[Any] = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(following for following, _ in node.next_functions)
    return found
