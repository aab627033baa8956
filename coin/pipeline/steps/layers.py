"""The comparison of coded models and experts layer by layer, as ``layers.csv``."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from coin.core.processes import rank_zero_info
from coin.core.progress import tracked
from coin.errors import CoinWarning
from coin.files.tensors import State
from coin.merging import Experts
from coin.merging.target import FAR, spread
from coin.networks import load_network
from coin.networks.experts import ExpertFiles, parameters_of
from coin.networks.heads import head_name
from coin.reporting.extras import write_layers
from coin.reporting.layers import fisher_shares, relative_distances
from coin.statistics.files import StatisticPaths
from coin.statistics.statistic import StatisticKind

UNRELATED = 0.6
"""N networks of independent random weights are √(N-1) apart; of one start two were at most 0.25."""


def _tell_how_far_apart(experts: Sequence[State], head: str) -> None:
    """Say how far experts' bodies are apart, relative to their weights, and warn where they cannot have one start."""
    apart = spread(experts, [1 / len(experts)] * len(experts), (head,))
    where = "near one another" if apart <= FAR else "far from one another"
    rank_zero_info(f"experts: {apart:.1%} of their weights apart, {where} (near is up to {FAR:.2%})")
    if len(experts) > 1 and apart > UNRELATED * (len(experts) - 1) ** 0.5:
        warnings.warn(
            f"found experts that are {apart:.0%} of their weights apart, as networks of different starts are, expected "
            "one start for all; fine-tune them from the same weights, for others cannot be merged",
            CoinWarning,
            stacklevel=2,
        )


def compare_layers(output: Path, files: ExpertFiles, coded: Mapping[Path, StatisticPaths]) -> None:
    """Write for every coded model and layer its share of Fisher mass and its distance to the experts.

    `coded` has the statistics that a coded model was made from, by its file; without any the file is removed. Says how
    far the experts are apart, and warns where they are as far apart as networks that have no start in common.
    """
    if not coded:
        output.unlink(missing_ok=True)
        return
    experts = Experts(files).parameters
    _tell_how_far_apart(experts, f"{head_name(files.skeleton)}.")
    fishers: dict[tuple[Any, ...], dict[str, float]] = {}  # methods share their statistics, and the rows of a code too
    rows: list[dict[str, Any]] = []
    for path, statistics in tracked(coded.items(), "layers"):
        file = load_network(path)
        made = file.provenance
        weights = made["code"][made["row"]]
        data = made.get("chosen", {}).get("fisher_data")
        shares: dict[str, float] = {}
        for which in statistics:
            if which.name is StatisticKind.fisher and which.data == data:
                key = (which, *weights)
                if key not in fishers:
                    fishers[key] = fisher_shares(Experts(files, statistics=statistics).statistic(which), weights)
                shares = fishers[key]
        distances = relative_distances(parameters_of(file.network), experts, weights)
        rows += [
            {
                "method": made["label"],
                "batchnorm": made["batchnorm"],
                "code_row": str(made["row"]),
                "layer": layer,
                "fisher_share": shares.get(layer),
                "distance": distance,
            }
            for layer, distance in distances.items()
        ]
    write_layers(output.parent, pd.DataFrame(rows))
