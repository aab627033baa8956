"""The merge step in memory: experts, their statistics and calibration data in, coded models out."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from coin.coding import Code
from coin.core.devices import device_of
from coin.errors import ConfigurationError
from coin.files.tensors import State
from coin.merging.experts import Experts
from coin.merging.method import CodedModel, Method
from coin.networks.adapted import with_adapters
from coin.networks.compressed import Compressed
from coin.networks.weights import to_compute


class Merged(list[nn.Module]):
    """Coded models, one per row of the code, and how they were made.

    `chosen` has the `CodedModel.chosen` of each; `compressed` the coded models of each compressed variant by its label,
    such as ``refit-4bit``; `passes` and `seconds` the total cost, in forward-equivalents of one sample and wall time.

    >>> merged = coin.merge_networks(coin.Average(), experts, code)
    >>> len(merged), merged.chosen, merged.passes
    (1, [{}], 0.0)
    """

    def __init__(
        self,
        made: Sequence[CodedModel],
        compressed: dict[str, list[Compressed]],
        passes: float,
        seconds: float,
    ) -> None:
        super().__init__(with_adapters(each.network, each.adapters) for each in made)
        self.chosen = [each.chosen for each in made]
        self.compressed = compressed
        self.passes = passes
        self.seconds = seconds


def merge_networks(
    method: Method,
    networks: Sequence[nn.Module],
    code: Code | Sequence[Sequence[float]],
    *,
    fishers: Sequence[State] | None = None,
    grams: Sequence[State] | None = None,
    initial: nn.Module | None = None,
    calibration: Sequence[Iterable[Any]] | None = None,
) -> Merged:
    """Merge N experts into coded models: R new networks in eval mode, one per row of the code, R×N.

    See `Experts` for the other arguments. The networks are made, and left, on the experts' device; where that has no
    float64, as Apple's MPS, they are made on the CPU, where compressed ones stay. With adapters they are
    `coin.Adapted`, called with ``experts=``. Raises as `Code`, `Experts` and `Method.coded_model`.

    >>> coded = coin.merge_networks(coin.Refit(), experts, code, calibration=inputs)
    >>> len(coded), coded.chosen[0]["averaged"], coded.passes > 360
    (1, [], True)
    """
    if not isinstance(method, Method):
        raise ConfigurationError(
            f"found method {method!r}, expected an object of a method's class; give coin.Refit()"
        )
    if not isinstance(code, Code):
        code = Code(code)
    if not networks:
        raise ConfigurationError("found no experts, expected at least one")
    home = device_of(networks[0])
    experts = Experts(
        to_compute([*networks], home),
        fishers=fishers,
        grams=grams,
        initial=None if initial is None else to_compute([initial], home)[0],
        calibration=calibration,
    )
    began = time.perf_counter()
    made = []
    compressed: dict[str, list[Compressed]] = {label: [] for label in method.compressed_labels}
    # On other devices the passes themselves suspend it (`coin.networks.guard.evaluating`).
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        for variant in method.coded_models(experts, code):
            if variant.packed is None:
                made.append(variant.made)
            else:
                compressed[variant.label].append(variant.packed)
    merged = Merged(made, compressed, experts.passes, time.perf_counter() - began)
    for network in merged:
        network.to(home)
    return merged
