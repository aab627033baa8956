"""Record the layers of one forward pass, and hand their rules the gradients that arrive in backward passes."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
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

Receive = Callable[[Call, Tensor], None]
"""(call, the gradients g [V, B·k, …] that arrive at its output): what is done with these."""


class Tape:
    """One forward pass over B samples, and backward passes that hand its layers' rules what they need.

    A layer rule computes what autograd does not: sums over samples of squared gradients by a layer's parameters. It
    needs the layer's input x, and the gradients g that arrive at the layer's output in a backward pass.

    **Forward**, in `run`: while the network runs, an `Interceptor` catches every call of a function that has a rule,
    such as `torch.nn.functional.linear`, if its weight or bias is a trainable parameter. Such a *ruled call* is kept
    with its input in `calls`, and becomes a node of its own in autograd's graph, `_RuledCall`. All else is plain
    autograd, so that any network will do.

    **Backward**: a pass starts at the logits with a cotangent U [B, C] in place of a loss's gradient; V of them run
    together by `torch.vmap`. Autograd brings g [V, N, …] to the node of a ruled call. There the tape gives it to
    whoever wants it (`add_squares`: to the rule), and returns the gradients by x, with which autograd goes on.
    Gradients by parameters are not formed.

    **Rows**: a rule squares a sample's gradient, so it must know which of the N rows of a call belong to a sample. It
    assumes that N = B·k, and that the first k rows are the first sample's, the next k the second's, and so on. The
    shape does not tell: [T, B, C] with T = B looks like [B, T, C]. `misplaced` finds out where it is wrong. That takes
    backward passes, so it is done for two samples, and the tape of many is given the k found there as `rows`.

    **What no rule may count**, since a parameter's gradient is a sum over all its uses that is squared afterwards: a
    parameter of two calls, or one that is used outside ruled calls too. `shared` returns these.

    Args:
        parameters: The trainable ones, by name.
        rows: Parameter name → k at the parameter's one call: no other calls are ruled. None, for a few samples: all
            calls of B·k rows are ruled, and a `Flow` follows the values.

    Attributes:
        calls: The ruled calls, in their order.
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
        self._flow: Flow | None = None  # while the network runs
        self.calls: list[Call] = []
        self.weights: list[str] = []
        self.sorts = False
        # Of the backward pass that is running.
        self._receive: Receive
        self._cotangents = 1  # V
        self._fills_zeros = False  # whether zero weights are replaced

    def run(self, network: nn.Module, inputs: Batch) -> Tensor:
        """Record the ruled calls for samples [B, …]; return the output [B, C], a DataError for another."""
        self._samples = size_of(inputs)
        if self._rows is None:
            self._flow = Flow(self._parameters, self._visit, inputs)
        with self._flow or Interceptor(self._parameters, self._visit):
            output = logits_of(network, inputs)
        if self._flow is not None:
            self.sorts = self._flow.placed
            reads = {id(node): times for node, times in self._flow.reads.items()}
            for call in self.calls:
                call.readers = reads.get(call.node, 0)
            self._flow = None  # its nodes hold the tape
        is_tensor = isinstance(output, Tensor)
        if not is_tensor or output.ndim != 2 or len(output) != self._samples:
            found = [*output.shape] if is_tensor else type(output).__name__
            raise DataError(
                f"the network's output is {found}, expected logits [{self._samples}, C]; "
                "wrap it in a module that returns them"
            )
        return output

    def _visit(
        self, call: Call, names: dict[str, str], function: Callable[[], Tensor]
    ) -> Tensor | None:
        if "weight" in names:
            self.weights.append(names["weight"])
        k, rest = divmod(len(call.inputs), self._samples)
        if rest != 0 or k == 0:
            return None
        if self._rows is not None and any(self._rows.get(name) != k for name in names.values()):
            return None
        source = call.inputs
        call.inputs = source.detach()  # a call that kept its history would keep itself alive
        output: Tensor = _RuledCall.apply(self._anchor, source, call, self, function)  # type: ignore[no-untyped-call]
        call.made = output.shape
        call.source = id(source.grad_fn)
        call.node = id(output.grad_fn)
        call.decided = self._flow is not None and self._flow.placed_by_learned
        self.calls.append(call)
        return output

    def shared(self, output: Tensor) -> set[str]:
        """Return the parameters that are not used by one ruled call alone, in the graph behind the output."""
        times = Counter(name for call in self.calls for name in call.names.values())
        elsewhere = _leaves(output)
        return {
            name
            for name, parameter in self._parameters.items()
            if times[name] > 1 or id(parameter) in elsewhere
        }

    def misplaced(self, output: Tensor, *, batched: bool = True) -> set[str]:
        """Return the parameters at whose calls rows do not lie sample by sample, k of each; the graph is kept.

        Two backward passes of a few samples show it: in the second the cotangent of sample n = 0, 1, … is 2ⁿ times
        what it is in the first. Backward passes are linear, so 2ⁿ times as much must arrive at each row that is of
        sample n alone; at other rows something else arrives. A power of two rounds nothing, so that is so to the last
        bit, however much of a gradient is rounding. A call that no gradient reaches counts as misplaced.
        """
        samples, classes = output.shape
        scales = 2 ** torch.arange(samples).to(output)
        # Any cotangent does that no symmetry of the outputs cancels.
        once = torch.arange(1, classes + 1).cos().to(output).expand_as(output)
        scaled = scales[:, None] * once
        arrived: dict[Call, list[Tensor]] = {call: [] for call in self.calls}
        self._fills_zeros = True  # zeros would hide the calls in front of them
        self._backward(
            output, torch.stack([once, scaled]), lambda call, g: arrived[call].append(g), batched
        )
        self._fills_zeros = False
        found: set[str] = set()
        for call, gradients in arrived.items():
            if not gradients or not _is_placed(torch.cat(gradients), scales):
                found.update(call.names.values())
        return found

    def add_squares(
        self,
        output: Tensor,
        blocks: Iterable[Tensor],
        totals: Mapping[str, Tensor],
        general: Collection[str],
    ) -> int:
        """Have the rules add Σ_n Σ_v (Uᵥₙ · ∂f(x_n)/∂θ)² to the totals, by parameter; return how many v there were.

        Args:
            output: What `run` returned.
            blocks: The cotangents U [v, B, C], each block for one backward pass.
            totals: Parameter name → accumulator.
            general: The parameters to leave out.
        """
        own: dict[Call, Totals] = {}
        for call in self.calls:
            own[call] = {
                role: totals[name] for role, name in call.names.items() if name not in general
            }
        if not output.requires_grad or not any(own.values()):
            return 0

        def accumulate(call: Call, g: Tensor) -> None:
            if own[call]:
                call.accumulate(g.to(sum_type(g)), self._samples, own[call])

        count = 0
        for block in blocks:
            self._backward(output, block, accumulate)
            count += len(block)
        for call, its_totals in own.items():
            call.finish(its_totals)
        return count

    def _backward(
        self, output: Tensor, cotangents: Tensor, receive: Receive, batched: bool = True
    ) -> None:
        """Run the backward passes of cotangents [V, B, C], by default together."""
        if not self.calls or not output.requires_grad:
            return

        def pull_back(cotangent: Tensor) -> Tensor:
            torch.autograd.grad(
                output, self._anchor, cotangent, retain_graph=True, allow_unused=True
            )
            return cotangent

        self._receive = receive
        self._cotangents = len(cotangents) if batched else 1
        if batched:
            torch.vmap(pull_back)(cotangents)
        else:
            for cotangent in cotangents:
                pull_back(cotangent)
        del self._receive  # which may hold the tape

    def contract(self, call: Call, g: Tensor, needs_input: bool) -> Tensor:
        """Hand on the gradients [V, N, …] of a call's output; return its input's, if asked, else anything."""
        # Where none depends on v, autograd hands on one for all.
        self._receive(call, g.expand(self._cotangents, *g.shape[1:]))
        if not needs_input:
            return g
        weight = call.weight
        if self._fills_zeros and bool((weight == 0).any()):
            # Equal numbers would give gradients that a normalisation in front cancels.
            numbers = torch.arange(1, weight.numel() + 1, device=weight.device).cos()
            weight = weight.where(weight != 0, numbers.view(weight.shape).to(weight))
        return call.input_gradient(g, weight)


def _is_placed(g: Tensor, scales: Tensor) -> bool:
    """Say whether every row of gradients [2, B·k, …] is in the second pass its sample's scale [B] times the first's.

    Entries as small as the rounding of the largest show nothing.
    """
    once, scaled = g.reshape(2, len(scales), -1)
    largest = float(once.abs().max())
    precision = torch.finfo(g.dtype).eps
    return largest > 0 and torch.allclose(
        scaled / scales[:, None],
        once,
        rtol=precision**0.5,
        atol=64 * precision * largest,
    )


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
    """A node of autograd's graph: the function itself forwards, `Tape.contract` backwards."""

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
