"""Matrix-free products with the Jacobian of a network's outputs by its parameters, over fixed inputs."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from coin.core.batches import Batch, as_input, size_of
from coin.errors import StateError
from coin.files.tensors import State, check_same_layout
from coin.statistics.guard import evaluating, paired
from coin.statistics.sums import sum_type


class OutputMap:
    """The map θ → f_θ(x_1 … x_P), [P, C], with its Jacobian J as an operator.

    The network, [B, …] to [B, C], runs in eval mode and is left as found; parameters that a call does not name keep its
    own values. Every method is one pass over the inputs, iterated anew; `passes` counts forward-equivalents: 1 a sample
    for outputs, 2 for a jvp, 3 for a vjp.
    """

    def __init__(self, network: nn.Module, inputs: Iterable[Batch]) -> None:
        self._network, self._inputs = network, inputs
        self.passes = 0.0

    def outputs(self, parameters: State) -> Tensor:
        """Return f_θ at all inputs, [P, C]."""
        with evaluating(self._network, gradients=False):
            state = _own(parameters)
            return torch.cat([functional_call(self._network, state, (x,)) for x in self._batches(1)])

    def jvp(self, parameters: State, tangent: State) -> Tensor:
        """Return J·v at θ, [P, C]; raises StateError unless the tangent v has the parameters' names and shapes."""
        with evaluating(self._network):
            push = self._along(parameters, tangent)
            return torch.cat([push(x).detach() for x in self._batches(2)])

    def vjp(self, parameters: State, cotangent: Tensor) -> dict[str, Tensor]:
        """Return Jᵀ·u at θ; raises StateError unless the cotangent u [P, C] has a row for every input."""
        with evaluating(self._network):
            total, seen = self._pull_back(parameters, 3, lambda x, start: cotangent[start : start + size_of(x)])
        if seen != len(cotangent):
            raise StateError(f"found a cotangent of {len(cotangent)} rows for {seen} inputs, expected one row each")
        return {name: value.to(parameters[name].dtype) for name, value in total.items()}

    def fisher_product(self, parameters: State, tangent: State) -> dict[str, Tensor]:
        """Return F·v = (1/P) Jᵀ J v at θ, F the whole Gaussian-output Fisher matrix; raises as `jvp`."""
        with evaluating(self._network):
            push = self._along(parameters, tangent)
            total, seen = self._pull_back(parameters, 5, lambda x, _: push(x))
        return {name: (value / seen).to(parameters[name].dtype) for name, value in total.items()}

    def _batches(self, passes: int) -> Iterator[Batch]:
        inputs = None
        for batch in self._inputs:
            inputs = as_input(batch, self._network)
            self.passes += passes * size_of(inputs)
            yield inputs
        if inputs is None:
            raise StateError("found no inputs, expected at least one batch")

    def _along(self, parameters: State, tangent: State) -> Callable[[Batch], Tensor]:
        """Return x → J·v there."""
        check_same_layout([parameters, tangent], ["the parameters", "the tangent"])
        at, along = _own(parameters), _own(tangent)

        def push(x: Batch) -> Tensor:
            def function(values: dict[str, Tensor]) -> Tensor:
                return functional_call(self._network, values, (x,))  # type: ignore[no-any-return]

            try:
                return jvp(function, (at,), (along,))[1]  # type: ignore[no-any-return]
            except (NotImplementedError, RuntimeError) as error:
                if "forward" not in str(error) and "jvp" not in str(error):
                    raise
                self.passes += 3 * size_of(x)
                return _by_two_vjps(function, at, along)  # some function has no derivative forwards, as weight_norm

        return push

    def _pull_back(
        self, parameters: State, passes: int, cotangent: Callable[[Batch, int], Tensor]
    ) -> tuple[dict[str, Tensor], int]:
        """Return Jᵀ·u, in the type of sums, and the number of inputs; u is asked for by a batch and where it starts."""
        total, seen = {name: torch.zeros_like(value, dtype=sum_type(value)) for name, value in parameters.items()}, 0
        leaves = {name: value.requires_grad_() for name, value in _own(parameters).items()}
        for x in self._batches(passes):
            piece, seen = cotangent(x, seen).detach(), seen + size_of(x)
            if len(piece) < size_of(x):  # for the caller to refuse
                continue
            if len(piece) == 1:
                x, piece = paired(self._network, x, piece)
            output = functional_call(self._network, leaves, (x,))
            gradients = torch.autograd.grad(output, list(leaves.values()), piece, allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    total[name].add_(gradient)
        return total, seen


def _by_two_vjps(function: Callable[[dict[str, Tensor]], Tensor], at: State, along: State) -> Tensor:
    """Return J·v as the derivative of u ↦ Jᵀ·u, which is linear in u, along v."""
    leaves = {name: value.requires_grad_() for name, value in _own(at).items()}
    output = function(leaves)
    u = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, list(leaves.values()), u, create_graph=True, allow_unused=True)
    pairs = [(each, along[name]) for name, each in zip(leaves, pulled, strict=True) if each is not None]
    return torch.autograd.grad([each for each, _ in pairs], u, [direction for _, direction in pairs])[0]


def _own(state: State) -> dict[str, Tensor]:
    """Return ordinary tensors without history; autograd refuses those made under inference mode."""
    return {name: value.clone() if value.is_inference() else value.detach() for name, value in state.items()}
