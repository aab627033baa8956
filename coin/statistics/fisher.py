"""The Fisher diagonal of a network over calibration data, by layer rules where they hold."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coin.core.batches import (
    Batch,
    channels_last,
    joined,
    samples_of,
    shapes_in,
    size_of,
    take,
    tensors_in,
)
from coin.core.choices import check_integer, parse_enum
from coin.core.devices import device_of
from coin.core.memory import is_out_of_memory
from coin.errors import ConfigurationError, DataError
from coin.files.tensors import check_finite
from coin.networks.calling import as_input, logits_of
from coin.networks.guard import check_apart, differentiable, evaluating, trainable
from coin.statistics.cotangents import FisherKind, class_cotangents, random_cotangents
from coin.statistics.sums import Sums, sum_type
from coin.statistics.tape import Tape

DEFAULT_MEMORY_MIB = (
    1024  # the default of memory_mib: a Fisher pass's peak beyond the network and the accumulators
)
_GRADIENTS = 6  # tensors of the widest layer's cotangents alive at once: at its output and input, and what a rule makes
_KEPT = 2  # floats kept for the backward pass per float of a ruled call's input: itself, and as much between calls
# Of the widest layer's cotangents on CPUs: fewer read the weights too often (ResNets, 32×32).
_ENOUGH_BYTES = 48 << 20


@dataclass(frozen=True)
class FisherOptions:
    """Which Fisher diagonal it is, and how it is computed; raises ConfigurationError for options out of their range.

    Args:
        kind: Which diagonal.
        mc_samples: k, the number of random cotangents a sample, for the Monte Carlo kind; none takes 1.
        memory_mib: The working memory in MiB, beside the network and the sums, to which samples and cotangents are cut;
            one of each is taken whatever it needs. It changes last bits alone.
        samples_per_task: P, the number of unlabelled samples of each task, where they are drawn.
    """

    kind: FisherKind = FisherKind.exact
    mc_samples: int | None = None
    memory_mib: int = DEFAULT_MEMORY_MIB
    samples_per_task: int = 200

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", parse_enum(FisherKind, "kind", self.kind))
        check_integer("memory_mib", self.memory_mib, 1)
        check_integer("samples_per_task", self.samples_per_task, 1)
        if self.mc_samples is None:
            return
        check_integer("mc_samples", self.mc_samples, 1)
        if self.kind is not FisherKind.monte_carlo:
            raise ConfigurationError(
                f"found mc_samples={self.mc_samples} for the {self.kind} Fisher; only monte_carlo takes one"
            )


def fisher_sums(
    network: nn.Module,
    batches: Iterable[Any],
    options: FisherOptions | None = None,
    *,
    generator: torch.Generator | None = None,
    **choices: Any,
) -> Sums:
    """Return the sum over samples of the per-sample Fisher diagonal, for what requires gradients, or for all.

    Args:
        network: Maps [B, …] to logits [B, C]; run in eval mode and left as found.
        batches: Input batches [B, …], of any sizes: a tensor, tensors by name, or a tuple or list of one of these and
            labels, which are not looked at.
        options: How it is computed; `FisherOptions`' defaults if None.
        generator: Of Monte Carlo's cotangents; torch's global one by default.
        **choices: Options by name, such as ``kind="monte_carlo"``.

    Raises ConfigurationError for options that do not belong together or nothing to differentiate by; DataError where
    there are no samples, the output is not [B, C] or a batch holds no tensors; StateError where the outputs depend on a
    sample's neighbours in the batch.
    """
    fisher = _Pass(network, replace(options or FisherOptions(), **choices), generator)
    for batch in batches:
        fisher.add(batch)
    if fisher.count == 0:
        raise DataError(
            "found no calibration samples, expected at least one batch; raise the number of samples"
        )
    totals = {name: total.contiguous() for name, total in fisher.totals.items()}
    return Sums(totals, fisher.count, fisher.passes)


def fisher_diagonal(
    network: nn.Module, batches: Iterable[Any], **options: Any
) -> dict[str, Tensor]:
    """Return the mean over samples of what `fisher_sums` adds up, by the same arguments; StateError if not finite.

    >>> coin.fisher_diagonal(torch.nn.Linear(2, 1), [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])["weight"]
    tensor([[ 5., 10.]])
    """
    sums = fisher_sums(network, batches, **options)
    check_finite(sums.values, "the Fisher")
    return {name: value.div_(sums.count) for name, value in sums.values.items()}


@dataclass(frozen=True)
class _Layout:
    """How samples of one shape are laid out in a network: which rules hold, and how much memory a sample takes."""

    # As of `Tape`, for the parameters with a rule; None: one sample at a time.
    rows: Mapping[str, int] | None
    kept: int  # bytes that a sample keeps for the backward pass
    widest: int  # bytes of the widest layer's cotangent, or of the outputs', for a sample
    outputs: int
    ordered: Callable[[Batch], Batch]  # puts a batch in the order of memory that it was found in


class _Pass:
    """Adds up Σ_n Σ_v (Uᵥₙ · ∂f(x_n)/∂θ)² over batches, U the cotangents of the kind; arguments as of `fisher_sums`."""

    def __init__(
        self,
        network: nn.Module,
        options: FisherOptions,
        generator: torch.Generator | None,
    ) -> None:
        self.network = network
        self.options = options
        self.generator = generator
        self._parameters = trainable(network)
        with torch.inference_mode(False):
            self.totals = {
                name: _accumulator(parameter) for name, parameter in self._parameters.items()
            }
        self._layouts: dict[tuple[object, ...], _Layout] = {}
        self.count = 0
        self.passes = 0.0

    def add(self, batch: Any) -> None:
        """Add a batch [B, …], cut to fit the memory."""
        with evaluating(self.network), differentiable(self._parameters.values()):
            inputs = as_input(batch, self.network)
            size = size_of(inputs)
            key = (*shapes_in(inputs), size > 1)
            if key not in self._layouts:
                self._layouts[key] = _find_layout(self.network, self._parameters, inputs)
            layout = self._layouts[key]
            samples, cotangents = self._choose_cut(layout)
            for start in range(0, size, samples):
                self._add_piece(take(inputs, slice(start, start + samples)), layout, cotangents)

    def _choose_cut(self, layout: _Layout) -> tuple[int, int]:
        """Choose how many samples b and cotangents v go through a pass together; one each at least.

        The estimate is b·(activations kept) + b·v·(widest layer, or the outputs)·(tensors alive). All V cotangents
        stay together as long as one sample fits, since the Gram rule gains from them.
        """
        cotangents = layout.outputs
        if self.options.kind is FisherKind.monte_carlo:
            cotangents = self.options.mc_samples or 1
        available = self.options.memory_mib << 20
        alive = layout.widest * _GRADIENTS
        samples = available // (layout.kept + cotangents * alive)
        if samples < 1:
            fitting = (available - layout.kept) // alive
            return 1, max(1, min(cotangents, fitting))
        if layout.rows is None:
            return 1, cotangents
        if device_of(self.network).type == "cpu":
            enough = _ENOUGH_BYTES // (cotangents * layout.widest)
            samples = min(samples, max(1, enough))
        return samples, cotangents

    def _add_piece(self, piece: Batch, layout: _Layout, chunk: int) -> None:
        """Add some samples, `chunk` of the cotangents at a time: by the rules, then one by one what these left out."""
        samples = size_of(piece)
        tape = Tape(self._parameters, layout.rows)
        output = tape.run(self.network, layout.ordered(piece))
        blocks = self._blocks(output.detach(), chunk)
        general = tape.shared(output)
        cotangents = tape.add_squares(output, blocks(), self.totals, general)
        self.passes += samples * (1 + 2 * cotangents)
        self.count += samples
        del tape, output  # whose memory the general way can use
        if general:
            self._add_one_by_one(piece, blocks, general)

    def _blocks(self, logits: Tensor, size: int) -> Callable[[], Iterable[Tensor]]:
        """Return what yields the cotangents U [V, B, C] of the kind, the same at every call, `size` at a time."""
        kind = self.options.kind
        if kind is FisherKind.monte_carlo:
            drawn = random_cotangents(logits, self.options.mc_samples or 1, self.generator)
            return partial(drawn.split, size)
        return partial(class_cotangents, kind, logits, size)

    def _add_one_by_one(
        self, samples: Batch, blocks: Callable[[], Iterable[Tensor]], names: Collection[str]
    ) -> None:
        """Add every sample's squares for some parameters, by a backward pass for each of its cotangents [v, b, C]."""
        chosen = [self._parameters[name] for name in names]
        for n, sample in enumerate(samples_of(samples)):
            logits = logits_of(self.network, sample)
            self.passes += 1
            if not logits.requires_grad:
                continue
            for cotangent in (row[n : n + 1] for block in blocks() for row in block):
                gradients = torch.autograd.grad(
                    logits, chosen, cotangent, retain_graph=True, allow_unused=True
                )
                self.passes += 2
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is not None:
                        total = self.totals[name]
                        whole = gradient.to_dense().to(total.dtype)
                        total.addcmul_(whole, whole)


def _accumulator(parameter: Tensor) -> Tensor:
    """Return zeros of a parameter's shape; kernels with the channels last in memory, as the convolution rule writes."""
    if parameter.ndim < 3:
        return parameter.new_zeros(parameter.shape, dtype=sum_type(parameter))
    outputs, channels, *kernel = parameter.shape
    channels_at_end = parameter.new_zeros((outputs, *kernel, channels), dtype=sum_type(parameter))
    return channels_at_end.movedim(-1, 1)


def _find_layout(network: nn.Module, parameters: Mapping[str, Tensor], inputs: Batch) -> _Layout:
    """Find the layout of samples shaped like these, with images' channels last in memory where the network takes them.

    Convolutions are faster so, but a view, or a backward pass of several cotangents, may hold in the usual order alone:
    only a trial shows that.
    """
    if any(tensor.ndim == 4 for tensor in tensors_in(inputs)):
        try:
            return _layout_of(network, parameters, inputs, channels_last)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
    return _layout_of(network, parameters, inputs, lambda batch: batch)


def _layout_of(
    network: nn.Module,
    parameters: Mapping[str, Tensor],
    inputs: Batch,
    ordered: Callable[[Batch], Batch],
) -> _Layout:
    """Return the layout that the first two samples show, or two copies of a single one; StateError if they depend."""
    two = take(inputs, slice(0, 2)) if size_of(inputs) > 1 else joined([inputs, inputs])
    tape = Tape(parameters)
    output = tape.run(network, ordered(two))
    if size_of(inputs) > 1:
        check_apart(network, two, output)
    untrusted = {*parameters}
    try:
        untrusted = tape.misplaced(output) | tape.shared(output)
    except (
        RuntimeError
    ) as error:  # a backward pass that cannot be batched, unless for the order in memory
        if ordered is channels_last or is_out_of_memory(error):
            raise
    rows: dict[str, int] | None = None if tape.sorts else {}
    for call in tape.calls:
        if rows is not None and untrusted.isdisjoint(call.names.values()):
            rows.update(dict.fromkeys(call.names.values(), len(call.inputs) // 2))
    read = [call.inputs for call in tape.calls] or tensors_in(two)
    sizes = [tensor.numel() // 2 for tensor in read]  # of a sample
    outputs = output.shape[1]
    kept = _KEPT * sum(sizes) * output.element_size()
    widest = max(*sizes, outputs) * sum_type(output).itemsize
    return _Layout(rows, kept, widest, outputs, ordered)
