"""Record the ruled calls of one forward pass and drive their rules during the backward passes."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import (
    _add_batch_dim,
    get_unwrapped,
    is_batchedtensor,
    maybe_get_bdim,
    maybe_get_level,
)
from torch.autograd import Function

from coin.core.batches import Batch, size_of
from coin.errors import DataError
from coin.networks.calling import logits_of
from coin.statistics.flow import Flow
from coin.statistics.intercept import Interceptor
from coin.statistics.rules import Call, Totals
from coin.statistics.sums import sum_type


class Tape:
    """The ruled calls of a forward pass over B samples, in their order: a description of what the network computes.

    A rule squares per sample, so it must know which rows of its input [B·k, …] belong to one. The shape does not tell:
    [T, B, C] with T = B looks like [B, T, C]. `misplaced` finds out from the gradients themselves.

    Args:
        parameters: The trainable ones, by name.
        rows: Parameter name → k, the leading rows that a sample has at the parameter's one call: only these are ruled.
            None rules every call of B·k rows, and follows the values: see `sorts`.

    Attributes:
        calls: The ruled calls.
        weights: The names of the weights of all calls, ruled or not.
        sorts: Whether values may decide where a row goes, so that other samples' rows may lie otherwise.
    """

    repetitions = 2  # backward passes of `misplaced`

    def __init__(
        self, parameters: Mapping[str, Tensor], rows: Mapping[str, int] | None = None
    ) -> None:
        self._parameters = parameters
        self._rows = rows
        # Every ruled output depends on it; differentiating by it makes autograd visit them all, and nothing else.
        like = next(iter(parameters.values()))
        self._anchor = like.new_zeros(()).requires_grad_()
        self.calls: list[Call] = []
        self.weights: list[str] = []
        self.sorts = False
        self._totals: dict[Call, Totals] = {}
        self._arrived: dict[Call, list[Tensor]] | None = (
            None  # the cotangents, while rows are being told apart
        )
        self._cotangents = 1  # that run through the backward pass at once

    def run(self, network: nn.Module, inputs: Batch) -> Tensor:
        """Record the ruled calls for samples [B, …]; return the output [B, C], a DataError for another."""
        self._samples = size_of(inputs)
        flow = Flow(inputs) if self._rows is None else None
        with Interceptor(self._parameters, self._visit, flow):
            output = logits_of(network, inputs)
        is_tensor = isinstance(output, Tensor)
        if not is_tensor or output.ndim != 2 or len(output) != self._samples:
            found = [*output.shape] if is_tensor else type(output).__name__
            raise DataError(
                f"the network's output is {found}, expected logits [{self._samples}, C]; "
                "wrap it in a module that returns them"
            )
        if flow is not None:
            self.sorts = flow.placed
            reads = {id(node): times for node, times in flow.reads.items()}
            for call in self.calls:
                call.readers = reads.get(call.node, 0)
        return output

    def _visit(
        self, call: Call, names: dict[str, str], function: Callable[[], Tensor]
    ) -> Tensor | None:
        if "weight" in names:
            self.weights.append(names["weight"])
        k, rest = divmod(len(call.inputs), self._samples)
        if rest != 0 or k == 0:
            return None
        if self._rows is not None:
            expected = {self._rows.get(name) for name in names.values()}
            if expected != {k}:
                return None
        source = call.inputs
        call.inputs = source.detach()  # a call that kept its history would keep itself alive
        output: Tensor = _RuledCall.apply(self._anchor, source, call, self, function)  # type: ignore[no-untyped-call]
        call.names = names
        call.made = output.shape
        call.source = id(source.grad_fn)
        call.node = id(output.grad_fn)
        self.calls.append(call)
        return output

    def shared(self, output: Tensor) -> set[str]:
        """Return the parameters that are not used by one ruled call alone, in the graph behind the output."""
        times: Counter[str] = Counter()
        for call in self.calls:
            times.update(call.names.values())
        elsewhere = _leaves(output)
        found = set()
        for name, parameter in self._parameters.items():
            if times[name] > 1 or id(parameter) in elsewhere:
                found.add(name)
        return found

    def misplaced(self, output: Tensor, *, batched: bool = True) -> set[str]:
        """Find the parameters at whose calls the rows do not lie sample by sample, k rows each; the graph is kept.

        A backward pass is repeated with the samples' cotangents scaled by powers of two, which no rounding touches: at
        every row exactly the scale of its sample must arrive. A call that no gradient reaches counts as misplaced.
        Powers of two tell a few samples apart, not many.
        """
        samples, classes = output.shape
        powers = torch.arange(samples, device=output.device)
        scales = 2 ** powers.to(output.dtype)
        # Any cotangent does that no symmetry of the outputs cancels.
        numbers = torch.arange(1, classes + 1, device=output.device)
        once = numbers.to(output.dtype).cos().expand_as(output)
        scaled = scales[:, None] * once
        arrived: dict[Call, list[Tensor]] = {}
        self._arrived = arrived
        self.backward(output, torch.stack([once, scaled]), batched=batched)
        self._arrived = None
        found: set[str] = set()
        for call in self.calls:
            is_placed = call in arrived and self._is_placed(torch.cat(arrived[call]), scales)
            if not is_placed:
                found.update(call.names.values())
        return found

    def _is_placed(self, g: Tensor, scales: Tensor) -> bool:
        """Say whether the cotangents [2, N, …] are those of the first repetition in the right scales [B]."""
        _, rows, *_ = g.shape
        k = rows // self._samples
        once, scaled = g.reshape(2, self._samples, k, -1)
        expected = scales[:, None, None] * once
        error = (scaled - expected).abs().amax(-1)  # [B, k]
        row_size = once.abs().amax(-1)
        size = row_size.amax()
        precision = torch.finfo(g.dtype).eps
        allowed = precision**0.5 * row_size + 64 * precision * size
        is_placed = (error <= scales[:, None] * allowed).all()
        return bool(is_placed & (size > 0))

    def collect(self, totals: Totals, general: Collection[str]) -> None:
        """Have the rules add to the totals, by parameter, in the passes that follow, but for those `general`."""
        for call in self.calls:
            own = {}
            for role, name in call.names.items():
                if name not in general:
                    own[role] = totals[name]
            self._totals[call] = own

    def finish(self) -> None:
        """Add to the totals what the rules deferred until all cotangents had been seen."""
        for call, totals in self._totals.items():
            call.finish(totals)

    def backward(self, output: Tensor, cotangents: Tensor, *, batched: bool = True) -> bool:
        """Run the backward passes of cotangents [V, B, C], by default at once; say if there were any."""
        if not self.calls or not output.requires_grad:
            return False

        def pull_back(cotangent: Tensor) -> Tensor:
            torch.autograd.grad(
                output, self._anchor, cotangent, retain_graph=True, allow_unused=True
            )
            return cotangent

        if batched:
            self._cotangents = len(cotangents)
            torch.vmap(pull_back)(cotangents)
        else:
            self._cotangents = 1
            for cotangent in cotangents:
                pull_back(cotangent)
        return True

    def contract(self, call: Call, g: Tensor, needs_input: bool) -> Tensor:
        """Let a call's rule see the cotangents [V, N, …] of its output; return its input's, if asked, else anything."""
        if len(g) < self._cotangents:  # not batched: the same for every v
            g = g.expand(self._cotangents, *g.shape[1:])
        weight = call.weight
        if self._arrived is not None:
            self._arrived.setdefault(call, []).append(g)
            # Zeros would hide what lies in front of them.
            weight = torch.where(weight == 0, 1, weight)
        elif self._totals.get(call):
            cotangents = g.to(sum_type(g))
            call.accumulate(cotangents, self._samples, self._totals[call])
        return call.input_gradient(g, weight) if needs_input else g


def _leaves(output: Tensor) -> set[int]:
    """Return the ids of the leaf tensors in the graph behind an output."""
    found = set()
    seen: set[Any] = {None}
    stack: list[Any] = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
            if hasattr(node, "variable"):
                found.add(id(node.variable))
    return found


class _RuledCall(Function):
    """The function itself, with its rule in place of autograd's gradient of the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        source: Tensor,
        call: Call,
        tape: Tape,
        function: Callable[[], Tensor],
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.tape = tape
        if call.reads_input:
            ctx.save_for_backward(source)  # of which torch says whether it was changed in place
        output = function()
        # No view may be changed in place, and an expanded parameter must not be.
        return output.clone() if output._base is call.weight else output.data

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None, None
        needs_input = ctx.needs_input_grad[1]
        _ = ctx.saved_tensors  # raises an error where the input was changed
        # All that `torch.vmap` batches at once, without its ways for functions of one's own.
        if is_batchedtensor(g):
            cotangents = get_unwrapped(g).movedim(maybe_get_bdim(g), 0)
            gradients = ctx.tape.contract(ctx.call, cotangents, needs_input)
            gradient = _add_batch_dim(gradients, 0, maybe_get_level(g))
        else:
            gradient = ctx.tape.contract(ctx.call, g[None], needs_input)[0]
        return None, gradient if needs_input else None, None, None, None
