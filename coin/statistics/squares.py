"""The engine: squared per-sample gradients summed over samples, by layer rules where they hold."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from coin.statistics.memory import Layout, choose_cut
from coin.statistics.sums import sum_type
from coin.statistics.tape import Tape

_COPIES = 2
"""Samples in the pass that finds a layout: the fewest that can be told apart."""


class SquaredGradients:
    """Adds up Σ_n Σ_v (Uᵥₙ · ∂f(x_n)/∂θ)² over the batches it is given.

    Args:
        network: In eval mode, with gradients enabled (see `coin.statistics.guard.evaluating`).
        parameters: Name → parameter, those to differentiate by; at least one.
        memory_mib: Bound on the working memory, in MiB.
    """

    def __init__(self, network: nn.Module, parameters: Mapping[str, Tensor], memory_mib: int) -> None:
        self._network, self._parameters, self._memory_mib = network, parameters, memory_mib
        self._totals = {name: _accumulator(parameter) for name, parameter in parameters.items()}
        self._like = next(iter(parameters.values()))
        self._layouts: dict[tuple[object, ...], Layout] = {}

    def totals(self) -> dict[str, Tensor]:
        """Return the sums so far, each of its parameter's shape; in float32 where that has 16 bits."""
        return {name: total.contiguous() for name, total in self._totals.items()}

    def add(
        self, inputs: Tensor, number: Callable[[int], int], cotangents: Callable[[Tensor, int], Tensor]
    ) -> Iterator[tuple[int, float]]:
        """Add a batch, cut to fit the memory.

        Args:
            inputs: [B, …].
            number: C → V, the number of cotangents that will come for C classes.
            cotangents: (logits [b, C] of the samples from `start` on, start) → U [V, b, C].

        Yields:
            (samples, forward-equivalents spent) of every cut, when it is done.

        Raises:
            DataError: The network's output is not [B, C].
            StateError: The network changes in place what a gradient needs.
        """
        start = 0
        while start < len(inputs):
            key = (*inputs.shape[1:], len(inputs) > 1)
            known = key in self._layouts
            layout = self._layouts[key] if known else self._find_layout(inputs[:1])
            samples, chunk = choose_cut(layout, number(len(layout.logits)), self._memory_mib, self._like)
            piece = inputs[start : start + samples]
            tape, output = self._run(piece, layout)
            if not known:
                if not _close(output[0], layout.logits):  # a sample's output depends on its neighbours
                    layout = replace(layout, rows={})
                    tape, output = self._run(piece, layout)
                self._layouts[key] = layout
            rows = cotangents(output.detach(), start)
            passes, general = self._add_by_rules(tape, output, rows, chunk)
            passes *= len(piece)
            del tape, output
            if general:
                chosen = {name: parameter for name, parameter in self._parameters.items() if name in general}
                passes += add_per_sample_squares(self._network, piece, rows, chosen, self._totals)
            yield len(piece), passes
            start += len(piece)

    def _run(self, inputs: Tensor, layout: Layout) -> tuple[Tape, Tensor]:
        tape = Tape(len(inputs), layout.rows, self._totals, self._like)
        return tape, tape.run(self._network, inputs, self._parameters)

    def _find_layout(self, sample: Tensor) -> Layout:
        """Find, on copies of a sample [1, …], the calls whose rules can be trusted with samples of this shape.

        If values decide what lies where, one sample says nothing about others: then every cut is looked at by itself.
        """
        tape = Tape(_COPIES, None, self._totals, self._like)
        output = tape.run(self._network, torch.cat([sample] * _COPIES), self._parameters)
        untrusted = tape.misplaced(output, unseen=True) | tape.close(output, self._parameters)
        rows: dict[str, int] = {}
        for call, names in tape.calls.items():
            if untrusted.isdisjoint(names.values()):
                rows.update(dict.fromkeys(names.values(), len(call.inputs) // _COPIES))
        sizes = [call.inputs.numel() // _COPIES for call in tape.calls] or [sample.numel()]
        return Layout(None if tape.sorts else rows, sum(sizes), max(sizes), output[0].detach())

    def _add_by_rules(self, tape: Tape, output: Tensor, rows: Tensor, chunk: int) -> tuple[float, set[str]]:
        """Add what the rules answer for, by cotangents [V, b, C], `chunk` at a time.

        Returns:
            (the forward-equivalents spent per sample, the names of the parameters that are left to the general route).
        """
        passes = 1.0
        misplaced: set[str] = set()
        if tape.rows is None and tape.calls:
            misplaced = tape.misplaced(output, unseen=False)
            passes += 2.0 * tape.cotangents
        general = tape.close(output, self._parameters, misplaced)
        for start in range(0, len(rows), chunk):
            piece = rows[start : start + chunk]
            if tape.backward(output, piece, last=start + len(piece) == len(rows)):
                passes += 2.0 * len(piece)
        return passes, general


def add_per_sample_squares(
    network: nn.Module, inputs: Tensor, cotangents: Tensor, parameters: Mapping[str, Tensor], totals: dict[str, Tensor]
) -> float:
    """Add Σ_n Σ_v (Uᵥₙ · ∂f(x_n)/∂θ)² to `totals` for the given parameters, one sample and cotangent at a time.

    The general route: exact whatever the network does with a parameter, as it rests on nothing but the gradient of one
    sample's output.

    Args:
        network: In eval mode, gradients enabled.
        inputs: Samples [B, …].
        cotangents: U [V, B, C].
        parameters: Those to differentiate by.
        totals: Accumulators of the parameters' shapes, written in place.

    Returns:
        The forward-equivalents spent.
    """
    names, tensors = list(parameters), list(parameters.values())
    passes = 0.0
    for n in range(len(inputs)):
        logits = network(inputs[n : n + 1])
        passes += 1
        if not logits.requires_grad:
            continue
        for v in range(len(cotangents)):
            rows = torch.autograd.grad(
                logits, tensors, cotangents[v, n : n + 1], retain_graph=v + 1 < len(cotangents), allow_unused=True
            )
            passes += 2
            for name, row in zip(names, rows, strict=True):
                if row is not None:
                    row = row.to(totals[name].dtype)
                    totals[name].addcmul_(row, row)
    return passes


def _close(logits: Tensor, expected: Tensor) -> bool:
    """Say whether logits differ by no more than rounding can make of batches of another size."""
    bound = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().amax()
    return bool(((logits - expected).abs() <= bound).all())


def _accumulator(parameter: Tensor) -> Tensor:
    """Return zeros of a parameter's shape; kernels with the channels last in memory, as the convolution rule writes."""
    dtype = sum_type(parameter)
    if parameter.ndim < 3:
        return parameter.new_zeros(parameter.shape, dtype=dtype)
    shape = (parameter.shape[0], *parameter.shape[2:], parameter.shape[1])
    return parameter.new_zeros(shape, dtype=dtype).movedim(-1, 1)
