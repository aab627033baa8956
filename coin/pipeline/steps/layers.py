"""The comparison of coded models and experts layer by layer, as ``layers.csv``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from coin.core.progress import tracked
from coin.merging import Experts
from coin.networks import load_network
from coin.networks.experts import ExpertFiles, parameters_of
from coin.reporting.extras import write_layers
from coin.reporting.layers import fisher_shares, relative_distances
from coin.statistics.files import StatisticPaths
from coin.statistics.statistic import StatisticKind


def compare_layers(output: Path, files: ExpertFiles, coded: Mapping[Path, StatisticPaths]) -> None:
    """Write for every coded model and layer its share of Fisher mass and its distance to the experts.

    Without a coded model the file is removed.

    Args:
        output: ``layers.csv``.
        files: The experts.
        coded: The statistics that a coded model was made from, by its file.
    """
    if not coded:
        output.unlink(missing_ok=True)
        return
    experts = Experts(files).parameters
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
