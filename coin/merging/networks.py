"""From networks to networks: what a library user merges with."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from coin.coding import Code
from coin.merging.experts import Experts, Given
from coin.merging.method import Method


def merge_networks(
    method: Method,
    networks: Sequence[nn.Module],
    code: Code,
    *,
    fishers: Given | None = None,
    grams: Given | None = None,
    initial: nn.Module | None = None,
    calibration: Sequence[Iterable[Tensor]] | None = None,
) -> list[nn.Module]:
    """Merge experts into coded models, one a row of the code.

    Args:
        method: The merge method.
        networks: The N experts, of one architecture with equally many outputs.
        code: The code, R×N.
        fishers: Every expert's Fisher diagonal, where the method wants it; or several by their data, ``own`` and
            ``pooled``. They are computed from the calibration inputs where they are not given.
        grams: Every expert's Gram matrices, likewise.
        initial: The shared initialisation, where the method or the policy ``keep`` wants it.
        calibration: For every expert the batches ``[B, …]`` of its own task's unlabelled samples: what choices are
            made on and outputs are fitted to.

    Returns:
        R new networks in eval mode; ``method.make(coin.Experts(…), row)`` says what was chosen beside them.

    Raises:
        ConfigurationError: Something the method or the policy wants is not there.
        StateError: The experts do not fit together, or the result is not finite.
    """
    experts = Experts(networks, fishers=fishers, grams=grams, initial=initial, calibration=calibration)
    return [method.make(experts, row).network for row in code.matrix.tolist()]
