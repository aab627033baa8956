"""Statistics as safetensors files with their weights' fingerprint, data and sample count as metadata.

Other programs can read them: the metadata have one JSON value under ``coin`` (``statistic``, ``kind``, ``task``,
``data``, ``samples``, ``passes``, ``seconds``, and ``weights``, the fingerprint of the network's tensors).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coin.core.choices import parse_enum
from coin.errors import ConfigurationError, FileError, StateError
from coin.files.safetensors import StateFile, save_state
from coin.files.tensors import State, check_finite, fingerprint
from coin.statistics.cotangents import FisherKind
from coin.statistics.statistic import Statistic, StatisticKind
from coin.statistics.sums import Sums

# The files of every expert's statistics, by task.
StatisticPaths = Mapping[Statistic, Mapping[str, Path]]


def open_statistic(
    path: Path, statistic: str | None = None, weights: str | None = None
) -> StateFile:
    """Open the file of a ``fisher`` or ``gram``, of the weights with a fingerprint; none accepts any.

    Raises FileError where the file is missing, damaged, of another statistic or of other weights.
    """
    file = StateFile(path)
    found = file.provenance.get("statistic")
    kinds = [*StatisticKind] if statistic is None else [statistic]
    if found not in kinds:
        raise FileError(
            f"'{path}' holds {found or 'no statistic'}, expected {' or '.join(kinds)}; "
            "give a file of coin fisher or save_statistic"
        )
    own = str(file.provenance.get("weights"))
    if weights is not None and own != weights:
        raise FileError(
            f"'{path}' is of weights {own[:12]}…, expected {weights[:12]}…: the expert has changed since; "
            "run coin fisher again"
        )
    return file


def open_statistics(
    paths: StatisticPaths, which: Statistic, weights: Mapping[str, str]
) -> list[StateFile]:
    """Open one statistic of every expert, and check that it is of the weights with these fingerprints, by task."""
    own = paths.get(which, {})
    files = []
    for task, mark in weights.items():
        if task not in own:
            raise ConfigurationError(
                f"found no {which} of expert '{task}', which the method needs; run coin fisher on it and name the file"
            )
        files.append(open_statistic(own[task], which.name, mark))
    return files


def save_statistic(
    path: Path | str,
    values: State | Sums,
    network: nn.Module,
    *,
    statistic: StatisticKind | str = StatisticKind.fisher,
    kind: FisherKind | str = FisherKind.exact,
    **provenance: Any,
) -> None:
    """Write a network's Fisher diagonal or Gram matrices, with the fingerprint of the weights that they are of.

    Args:
        path: The file.
        values: What `fisher_diagonal` or ``gram_sums(…).mean()`` returns, the mean over samples by name, or sums.
        network: The network.
        statistic: Which of the two it is, ``fisher`` or ``gram``.
        kind: Of a Fisher.
        **provenance: Further JSON values of the file's metadata.

    Raises StateError where a tensor fits no parameter of the network, a number is not finite, or a Fisher negative;
    FileError where the file cannot be written.

    >>> coin.save_statistic("fisher.safetensors", coin.fisher_diagonal(experts[0], inputs[0]), experts[0])
    """
    statistic = parse_enum(StatisticKind, "statistic", statistic)
    made = dict(provenance)
    if isinstance(values, Sums):
        made["samples"] = values.count
        made["passes"] = values.passes
        values = values.mean()
    check_statistic(statistic, values, network)
    made["statistic"] = str(statistic)
    made["weights"] = fingerprint(network.state_dict())
    if statistic is StatisticKind.fisher:
        made["kind"] = str(parse_enum(FisherKind, "kind", kind))
    save_state(Path(path), values, made)


def load_statistic(path: Path | str, network: nn.Module) -> dict[str, Tensor]:
    """Return a network's Fisher diagonal or Gram matrices from a file of `save_statistic` or of ``coin fisher``.

    Raises FileError where the file is missing, damaged, no statistic or of other weights than the network's.

    >>> coin.save_statistic("fisher.safetensors", coin.fisher_diagonal(experts[0], inputs[0]), experts[0])
    >>> coin.load_statistic("fisher.safetensors", experts[0])["bias"]
    tensor([1., 1., 1.])
    """
    weights = fingerprint(network.state_dict())
    return dict(open_statistic(Path(path), weights=weights))


def check_statistic(
    statistic: StatisticKind, state: State, network: nn.Module, what: str = "the statistic"
) -> None:
    """Raise StateError where a Fisher, or Gram matrices, do not fit the network's parameters.

    It is raised too where a number is not finite, or one of a Fisher, which are squares, is negative.
    """
    check_finite(state, what)
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for name, tensor in state.items():
        parameter = parameters.get(name)
        if parameter is None:
            raise StateError(
                f"{what} has a tensor '{name}', which {type(network).__name__} has not; give its own"
            )
        found = [*tensor.shape]
        expected = [*parameter.shape]
        if statistic is StatisticKind.gram:
            expected = [*tensor.shape[:1], *tensor.shape[-1:] * 2]  # [G, K, K]
        if found != expected:
            raise StateError(
                f"{what} has '{name}' of {found}, expected {expected} of a {statistic}; give the network's own"
            )
        if statistic is StatisticKind.fisher and bool((tensor < 0).any()):
            raise StateError(
                f"{what} is negative in '{name}', expected mean squares; compute it again"
            )
