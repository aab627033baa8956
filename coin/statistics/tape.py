"""Record the ruled calls of one forward pass and drive their rules during the backward passes."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import _add_batch_dim, get_unwrapped, is_batchedtensor, maybe_get_bdim, maybe_get_level
from torch.autograd import Function

from coin.core.batches import Batch, size_of
from coin.errors import DataError
from coin.statistics.intercept import Interceptor, leaves
from coin.statistics.rules import Call, Totals
from coin.statistics.sums import sum_type


class Tape:
    """The ruled calls of a forward pass over B samples, in their order: a description of what the network computes.

    A rule squares per sample, so it must know which rows of its input [B·k, …] belong to one. The shape does not tell:
    [T, B, C] with T = B looks like [B, T, C]. `misplaced` finds out from the gradients themselves.

    Args:
        rows: Parameter name → k, the leading rows that a sample has at the parameter's one call: only these are ruled.
            None rules every call of B·k rows.
    """

    def __init__(self, parameters: Mapping[str, Tensor], rows: Mapping[str, int] | None = None) -> None:
        self._parameters, self.rows = parameters, rows
        # Every ruled output depends on it; differentiating by it makes autograd visit them all, and nothing else.
        self._anchor = next(iter(parameters.values())).new_zeros(()).requires_grad_()
        self.calls: list[Call] = []  # the ruled ones
        self.weights: list[str] = []  # the names of those of all calls, ruled or not
        self.cotangents, self._last = 1, True  # V of the backward pass that is running, and whether it is the last
        self._kept: dict[Call, dict[str, Tensor]] = {}
        self._arrived: dict[Call, list[Tensor]] | None = None  # the cotangents, while rows are being told apart
        self._unseen, self.sorts = False, False  # `sorts`: whether values may decide where a row goes

    def run(self, network: nn.Module, inputs: Batch) -> Tensor:
        """Record the ruled calls for samples [B, …]; return the output [B, C], a DataError for another."""
        self._samples = size_of(inputs)
        with Interceptor(self._parameters, self._visit, follow=self.rows is None) as interceptor:
            output: Tensor = network(inputs)
        self.sorts = interceptor.sorts
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if not isinstance(found, list) or len(found) != 2 or found[0] != self._samples:
            raise DataError(f"the network's output is {found}, expected logits [{self._samples}, C]; give forward=…")
        reads = {id(node): times for node, times in interceptor.reads.items()}
        for call in self.calls:
            call.readers = reads.get(call.node, 0)
        return output

    def _visit(self, call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> Tensor | None:
        self.weights += [names["weight"]] if "weight" in names else []
        k, odd = divmod(len(call.inputs), self._samples)
        if odd or k == 0 or (self.rows is not None and any(self.rows.get(n) != k for n in names.values())):
            return None
        source, call.inputs = call.inputs, call.inputs.detach()  # a call that kept it would keep itself alive
        result: Tensor = _RuledCall.apply(self._anchor, source, call, self, function)  # type: ignore[no-untyped-call]
        call.names, call.made = names, result.shape
        call.source, call.node = id(source.grad_fn), id(result.grad_fn)
        self.calls.append(call)
        return result

    def shared(self, output: Tensor) -> set[str]:
        """Return the parameters that are not used by one ruled call alone, in the graph behind the output."""
        times = Counter(name for call in self.calls for name in call.names.values())
        reached = leaves(output)
        return {name for name, parameter in self._parameters.items() if id(parameter) in reached or times[name] > 1}

    def misplaced(self, output: Tensor, *, unseen: bool, batched: bool = True) -> set[str]:
        """Find the parameters at whose calls the rows do not lie sample by sample, k rows each; the graph is kept.

        A backward pass is repeated with the samples' cotangents scaled by different powers of two, which no rounding
        touches: at every row exactly the scale of its sample must arrive. One repetition for each digit of the samples'
        numbers in base 4 tells all samples apart. A row without a gradient has no share in the squares; if `unseen`, a
        call without any counts as misplaced, since other samples may have some, and a weight of zero is looked behind.
        """
        numbers = torch.arange(self._samples, device=output.device)
        scales = [torch.ones_like(numbers)]
        while 4 ** (len(scales) - 1) < self._samples:
            scales.append(2 ** (numbers // 4 ** (len(scales) - 1) % 4))
        self._arrived, self._unseen, self.repetitions = {}, unseen, len(scales)
        # Any cotangent does that no symmetry of the outputs cancels.
        cotangent = torch.arange(1, output.shape[1] + 1, device=output.device).to(output.dtype).cos()
        by = torch.stack(scales).to(output.dtype)
        self.backward(output, by[:, :, None] * cotangent, last=False, batched=batched)
        arrived = self._arrived
        placed = {call: self._is_placed(by, torch.cat(pieces)) for call, pieces in arrived.items()}
        self._arrived = None
        return {name for call in self.calls if not placed.get(call, not unseen) for name in call.names.values()}

    def close(self, totals: Totals, general: Collection[str]) -> None:
        """Have the rules add to the totals, by parameter, in the passes that follow, but for those `general`."""
        for call in self.calls:
            self._kept[call] = {role: totals[n] for role, n in call.names.items() if n not in general}

    def backward(self, output: Tensor, cotangents: Tensor, *, last: bool, batched: bool = True) -> bool:
        """Run the backward passes of cotangents [V, B, C] at once, for the rules to add up; say if there were any."""
        if not self.calls or not output.requires_grad:
            return False
        self.cotangents, self._last = len(cotangents) if batched else 1, last

        def one(cotangent: Tensor) -> Tensor:
            torch.autograd.grad(output, self._anchor, cotangent, retain_graph=not last, allow_unused=True)
            return cotangent

        torch.vmap(one)(cotangents) if batched else [one(cotangent) for cotangent in cotangents]
        return True

    def contract(self, call: Call, g: Tensor, needs_input: bool) -> Tensor:
        """Let a call's rule see the cotangents [V, N, …] of its output; return its input's, if asked, else anything."""
        if len(g) < self.cotangents:  # not batched: the same for every v
            g = g.expand(self.cotangents, *g.shape[1:])
        if self._arrived is not None:
            self._arrived.setdefault(call, []).append(g)
        elif totals := self._kept.get(call):
            call.accumulate(g.to(sum_type(g)), self._samples, totals)
            if self._last:
                call.finish(totals)
        if not needs_input:
            return g
        gradient = call.input_gradient(g, call.weight)
        if self._arrived is not None and self._unseen and not bool(gradient.any()):
            gradient = call.input_gradient(g, torch.where(call.weight == 0, 1, call.weight))
        return gradient

    def _is_placed(self, scales: Tensor, g: Tensor) -> bool:
        """Say whether the cotangents [1 + digits, N, …] are those of the first repetition in the right scales."""
        first, *rest = g.reshape(len(g), self._samples, g.shape[1] // self._samples, -1)
        row_size, eps = first.abs().amax(-1), torch.finfo(g.dtype).eps
        size = row_size.amax()
        for scale, rows in zip(scales[1:, :, None], rest, strict=True):
            error = (rows - scale[..., None] * first).abs_().amax(-1)
            if not bool((error <= scale * (eps**0.5 * row_size + 64 * eps * size)).all()):
                return False
        return not self._unseen or bool(size > 0)


class _RuledCall(Function):
    """The function itself, with its rule in place of autograd's gradient of the weight."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, source: Tensor, call: Call, tape: Tape, function: Callable[[], Tensor]
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.tape = call, tape
        if call.reads_input:
            ctx.save_for_backward(source)  # of which torch says whether it was changed in place
        output = function()
        # No view may be changed in place, and an expanded parameter must not be.
        return output.clone() if output._base is call.weight else output.data

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 5
        needs_input, _ = ctx.needs_input_grad[1], ctx.saved_tensors
        if is_batchedtensor(g):  # all that `torch.vmap` batches at once, without its ways for functions of one's own
            whole = get_unwrapped(g).movedim(maybe_get_bdim(g), 0)
            found = _add_batch_dim(ctx.tape.contract(ctx.call, whole, needs_input), 0, maybe_get_level(g))
        else:
            found = ctx.tape.contract(ctx.call, g[None], needs_input)[0]
        return None, found if needs_input else None, None, None, None
