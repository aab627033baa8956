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
    such as `torch.nn.functional.linear`, if its weight or bias is a trainable parameter. Such a call, if it has B·k
    rows (entries of its input's first axis), is a *ruled call*: it is kept with its input in `calls`, and becomes a
    node of its own in autograd's graph, `_RuledCall`. All else is plain autograd, so that any network will do.

    **Backward**: a pass starts at the logits with a cotangent U [B, C] in place of a loss's gradient; V of them run
    together by `torch.vmap`. Autograd brings g [V, N, …] to the node of a ruled call. There the tape gives it to
    whoever wants it (`add_squares`: to the rule), and passes the gradients by x back, with which autograd goes on.
    Gradients by parameters are not formed.

    **Rows**: a rule squares a sample's gradient, so it must know which of the N rows of a call belong to a sample. It
    assumes that N = B·k, and that the first k rows are the first sample's, the next k the second's, and so on. The
    shape does not tell: [T, B, C] with T = B looks like [B, T, C]. `misplaced` finds out where it is wrong. That takes
    backward passes, so it is done for a few samples, and the tape of many is given the k found there as `rows`.

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
        self._samples = 0  # B, set by `run`
        # Every ruled output depends on it; differentiating by it makes autograd visit them all, and nothing else.
        like = next(iter(parameters.values()), torch.zeros(()))
        self._anchor = like.new_zeros(()).requires_grad_()
        self._flow: Flow | None = None  # while the network runs
        self.calls: list[Call] = []
        self.weights: list[str] = []
        self.sorts = False
        # Of the backward passes that are running.
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
            # A node's id is its own for as long as the output's graph holds the node.
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
        """Return the parameters that several ruled calls use, or anything else in the graph behind the output.

        A ruled call's parameters are no arguments of its node, so that as leaves of the graph they show another use.
        One behind `torch.Tensor.detach` does not show.
        """
        times = Counter(name for call in self.calls for name in call.names.values())
        elsewhere = _leaves(output)
        return {
            name
            for name, parameter in self._parameters.items()
            if times[name] > 1 or id(parameter) in elsewhere
        }

    def misplaced(self, output: Tensor, *, batched: bool = True) -> set[str]:
        """Return the parameters at whose calls rows do not lie sample by sample, k of each; the graph is kept.

        Two backward passes show it. The first starts with the same cotangent for every sample, the second with sample
        n's times its label, 2ⁿ. Backward passes are linear: at a row of sample n alone, the label times as much arrives
        in the second pass as in the first; at a row of another sample, or of several, something else does. (Times a
        power of two is exact, so what differs is not the rounding of the labels.) A call that no gradient reaches
        counts as misplaced.
        """
        samples, classes = output.shape
        labels = 2 ** torch.arange(samples).to(output)
        # Any cotangent does that no symmetry of the outputs cancels.
        once = torch.arange(1, classes + 1).cos().to(output).expand_as(output)
        cotangents = torch.stack([once, labels[:, None] * once])
        arrived: dict[Call, list[Tensor]] = {call: [] for call in self.calls}
        self._fills_zeros = True  # zeros would hide the calls in front of them
        self._backward(output, cotangents, lambda call, g: arrived[call].append(g), batched)
        self._fills_zeros = False
        found: set[str] = set()
        for call, gradients in arrived.items():
            if not gradients or not _are_labelled(torch.cat(gradients), labels):
                found.update(call.names.values())
        return found

    def add_squares(
        self,
        output: Tensor,
        blocks: Iterable[Tensor],
        totals: Mapping[str, Tensor],
        left_out: Collection[str],
    ) -> int:
        """Have the rules add Σ_n Σ_v (Uᵥₙ · ∂f(x_n)/∂θ)² to the totals, by parameter; return how many v there were.

        Args:
            output: What `run` returned.
            blocks: The cotangents U [v, B, C], each block for one backward pass.
            totals: Parameter name → accumulator.
            left_out: The parameters that no rule may count.
        """
        own: dict[Call, Totals] = {}
        for call in self.calls:
            own[call] = {
                role: totals[name] for role, name in call.names.items() if name not in left_out
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

    def pass_back(self, call: Call, g: Tensor, needs_input: bool) -> Tensor:
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


def _are_labelled(g: Tensor, labels: Tensor) -> bool:
    """Say whether every row of gradients [2, B·k, …] is in the second pass its sample's label [B] times the first's.

    Labels differ by whole factors, so a relative tolerance of half the digits tells them apart, whatever order a kernel
    adds in. Entries as small as the rounding of the largest show nothing.
    """
    once, labelled = g.reshape(2, len(labels), -1)
    largest = float(once.abs().max())
    precision = torch.finfo(g.dtype).eps
    return largest > 0 and torch.allclose(
        labelled / labels[:, None],
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
    """A node of autograd's graph: the function itself forwards, `Tape.pass_back` backwards."""

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
        # Autograd forbids changes in place of a view that such a node makes; `.data` hides that it is one. What shares
        # the parameter's memory, expanded, is copied.
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
            gradients = ctx.tape.pass_back(ctx.call, cotangents, needs_input)
            gradient = _add_batch_dim(gradients, 0, maybe_get_level(g))
        else:
            gradient = ctx.tape.pass_back(ctx.call, g[None], needs_input)[0]
        return None, gradient if needs_input else None, None, None, None
