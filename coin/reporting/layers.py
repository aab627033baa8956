"""A merge layer by layer, that is module by module with parameters: the Fisher's mass, and the way from the average."""

import math
from collections.abc import Iterable, Sequence

import torch

from coin.files.tensors import State, check_same_layout, doubled, weighted_mean


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the dotted names of a network's parameters by their layer's dotted name, both in the network's order."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return layers


def fisher_shares(fishers: Sequence[State], weights: Sequence[float]) -> dict[str, float]:
    """Return each layer's share of the mass of Σ_i β_i F_i, the sum of its entries over that of all.

    The experts' heads may differ in size. All shares are NaN where the Fishers are zero everywhere.
    """
    masses = {
        layer: sum(
            weight * float(fisher[name].sum(dtype=torch.float64))
            for fisher, weight in zip(fishers, weights, strict=True)
            for name in names
        )
        for layer, names in layers_of(fishers[0]).items()
    }
    total = sum(masses.values())
    return {layer: mass / total if total > 0 else math.nan for layer, mass in masses.items()}


def relative_distances(coded: State, experts: Sequence[State], weights: Sequence[float]) -> dict[str, float]:
    """Return each layer's distance from the β-average of the experts, relative to how far the experts are from it.

    ‖θ_c − θ̄‖ / √(Σ_i β_i ‖θ_i − θ̄‖²) with θ̄ = Σ_i β_i θ_i: 0 for plain averaging, 1 as far away as the experts are on
    the average; NaN where the experts agree as far as their type can tell. Raises StateError where names or shapes
    differ.
    """
    check_same_layout([coded, *experts], ["the coded model", *(f"expert {i}" for i in range(len(experts)))])
    distances = {}
    for layer, names in layers_of(experts[0]).items():
        moved = spread = size = 0.0
        for name in names:
            average = weighted_mean(experts, weights, name, torch.float64)
            moved += float((doubled(coded[name]) - average).abs().square().sum())
            size += float(average.abs().square().sum())
            spread += sum(
                weight * float((doubled(expert[name]) - average).abs().square().sum())
                for expert, weight in zip(experts, weights, strict=True)
            )
        rounding = 4 * torch.finfo(experts[0][names[0]].dtype).eps
        distances[layer] = math.sqrt(moved / spread) if spread > rounding**2 * size else math.nan
    return distances
