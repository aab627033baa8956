"""The statistics of all experts of a merge: given in memory or in files, or computed."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from coin.core.batches import Batch
from coin.errors import ConfigurationError
from coin.files.tensors import State
from coin.statistics.cotangents import FisherKind, process_generator
from coin.statistics.files import StatisticFile, open_statistic
from coin.statistics.fisher import fisher_sums
from coin.statistics.gram import gram_sums
from coin.statistics.guard import trainable
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind
from coin.statistics.sums import TRANSPOSED

Given = Sequence[State] | Mapping[str, Sequence[State]]
"""Every expert's statistic; or several of them, by the data that they are of: ``own``, ``pooled``."""

StatisticPaths = Mapping[Statistic, Mapping[str, Path]]
"""The files of every expert's statistics, by task."""


def available_data(given: Given | Mapping[str, Any] | None, name: StatisticKind, data: DataChoice) -> list[DataChoice]:
    """Return the data that an option allows of those that a statistic is given for, which are `given`'s keys.

    One that is computed, or given without data, is for any. Raises ConfigurationError where there are none.
    """
    if not isinstance(given, Mapping):
        return data.alternatives if given is None or data is not DataChoice.auto else [DataChoice.own]
    allowed = [DataChoice(each) for each in given if data in (DataChoice.auto, each)]
    if not allowed:
        found = f"found {name} statistics of {', '.join(given)} data, expected {data}"
        raise ConfigurationError(f"{found}; give such ones, or set {name}_data")
    return allowed


def open_statistics(paths: StatisticPaths, which: Statistic, weights: Mapping[str, str]) -> list[StatisticFile]:
    """Open one statistic of every expert, and check that it is of the weights with these fingerprints, by task."""
    own = paths.get(which, {})
    if missing := [task for task in weights if task not in own]:
        raise ConfigurationError(
            f"found no {which} of expert '{missing[0]}', which the method needs; run coin fisher on it and "
            "name the file"
        )
    return [open_statistic(own[task], statistic=which.name, weights=mark) for task, mark in weights.items()]


def compute_statistic(
    networks: Iterable[nn.Module], samples: Sequence[Iterable[Batch]], kind: FisherKind | None
) -> tuple[list[State], float]:
    """Return every network's Fisher of a kind, or its Gram matrices for none, on its samples, and the passes it took.

    Parameters that are frozen in one network have none in all: they are averaged.
    """
    if kind is FisherKind.empirical:
        raise ConfigurationError("found no labels for the empirical Fisher; compute it and give it as fishers")
    means, passes, trained = [], 0.0, []
    for network, batches in zip(networks, samples, strict=True):
        trained.append(set(trainable(network)))
        if kind is None:
            sums = gram_sums(network, batches)
        else:
            sums = fisher_sums(network, batches, kind=kind, generator=process_generator(kind, seed=0, rank=0))
        means.append(sums.mean())
        passes += sums.passes
    shared = set.intersection(*trained)
    return [{name: mean[name] for name in mean if name.removesuffix(TRANSPOSED) in shared} for mean in means], passes
