"""The Fisher diagonal of a network over calibration data."""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from coin.errors import DataError
from coin.inputs import as_input
from coin.statistics.cotangents import FisherKind, check_options, make_cotangents, number_of_cotangents
from coin.statistics.guard import evaluating, trainable
from coin.statistics.memory import check_memory
from coin.statistics.squares import SquaredGradients
from coin.statistics.sums import Sums

DEFAULT_MEMORY_MIB = 1024
"""What a Fisher pass may take at its peak beyond the network and the accumulators, in MiB, unless the user says."""


def fisher_sums(
    network: nn.Module,
    batches: Iterable[Tensor],
    *,
    kind: FisherKind = FisherKind.exact,
    labels: Tensor | None = None,
    cotangents: int | None = None,
    generator: torch.Generator | None = None,
    memory_mib: int = DEFAULT_MEMORY_MIB,
    progress: Callable[[int], None] | None = None,
) -> Sums:
    """Return the sum over samples of the per-sample Fisher diagonal, for the parameters that require gradients.

    Args:
        network: Maps [B, …] to logits [B, C]; run in eval mode and left as found.
        batches: Input batches [B, …], of any sizes.
        kind: Which diagonal.
        labels: True classes [P] in the order of the samples, for the empirical kind.
        cotangents: k for the Monte Carlo kind (1 if None).
        generator: Source of Monte Carlo's randomness; torch's global one if None.
        memory_mib: Bound on the working memory in MiB; batches are cut to fit, the numbers do not change.
        progress: Called with the number of samples done after every cut.

    Raises:
        ConfigurationError: Options that do not belong together, or no memory.
        DataError: An empty pass, labels that do not fit, or logits that are not [B, C].
    """
    kind = FisherKind(kind)
    check_options(kind, labels, cotangents)
    check_memory(memory_mib)
    with evaluating(network):
        parameters = trainable(network)
        number = functools.partial(number_of_cotangents, kind, cotangents=cotangents)
        engine = SquaredGradients(network, parameters, memory_mib)
        count, passes = 0, 0.0
        for batch in batches:
            inputs = as_input(batch, network)

            def rows(logits: Tensor, start: int, seen: int = count) -> Tensor:
                wanted = None if labels is None else labels[seen + start : seen + start + len(logits)]
                return make_cotangents(kind, logits, labels=wanted, cotangents=cotangents, generator=generator)

            for done, spent in engine.add(inputs, number, rows):
                count += done
                passes += spent
                if progress is not None:
                    progress(done)
        totals = engine.totals()
    if count == 0:
        raise DataError("found no calibration samples, expected at least one batch; raise the number of samples")
    if labels is not None and len(labels) != count:
        raise DataError(f"found {len(labels)} labels for {count} samples, expected one each, in their order")
    return Sums(totals, count, passes)


def fisher_diagonal(
    network: nn.Module,
    batches: Iterable[Tensor],
    *,
    kind: FisherKind = FisherKind.exact,
    labels: Tensor | None = None,
    cotangents: int | None = None,
    generator: torch.Generator | None = None,
    memory_mib: int = DEFAULT_MEMORY_MIB,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Return the Fisher diagonal, the mean over samples of what `fisher_sums` adds up; the same arguments."""
    sums = fisher_sums(
        network, batches, kind=kind, labels=labels, cotangents=cotangents, generator=generator,
        memory_mib=memory_mib, progress=progress,
    )  # fmt: skip
    # The sums are this function's own: dividing them in place saves a copy of the network's size.
    return {name: value.div_(sums.count) for name, value in sums.values.items()}
