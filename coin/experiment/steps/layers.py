"""The step that looks at every coded model layer by layer, from the files of experts, statistics and coded models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from coin.experiment.seed_run import SeedRun
from coin.experiment.store import step_key
from coin.merging import Method
from coin.merging.experts import parameters_of
from coin.networks import load_network
from coin.processes import from_first
from coin.progress import tracked
from coin.reporting.extras import LAYERS_CSV, write_layers
from coin.reporting.layers import fisher_shares, relative_distances
from coin.statistics.statistic import StatisticKind
from coin.steps.experts import StoredExperts


def compare_layers(run: SeedRun) -> None:
    """Write ``layers.csv``, unless it stands and is of these files."""
    methods = run.experiment.methods
    coded = {path: method for method in methods for path in run.coded_paths(method)}
    statistics = {path for method in methods for files in run.statistics(method).values() for path in files.values()}
    output = run.folder / LAYERS_CSV
    key = step_key({}, [*run.experts.paths.values(), *coded, *sorted(statistics)], run.experts.sha256)
    if not coded:
        from_first(lambda: output.unlink(missing_ok=True))
    if not coded or run.steps.finished("layers", key, [output]):
        return
    run.say("comparing the coded models layer by layer")
    from_first(lambda: write_layers(run.folder, _compared(run, coded)))
    run.steps.finish("layers", key, [output])


def _compared(run: SeedRun, coded: Mapping[Path, Method]) -> pd.DataFrame:
    """Return one row a coded model and layer: the layer's share of Fisher mass, its distance to the experts."""
    experts = run.experts.parameters
    fishers: dict[tuple[Any, ...], dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    for path, method in tracked(coded.items(), "layers"):
        file = load_network(path)
        made = file.provenance
        weights = made["code"][made["row"]]
        files = run.statistics(method)
        data = made.get("chosen", {}).get("fisher_data")
        shares: dict[str, float] = {}
        for which in files:
            if which.name is StatisticKind.fisher and which.data == data:
                key = (which, *weights)  # methods share their statistics, and the rows of a code too
                if key not in fishers:
                    fishers[key] = fisher_shares(StoredExperts(run.experts, files).statistic(which), weights)
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
    return pd.DataFrame(rows)
