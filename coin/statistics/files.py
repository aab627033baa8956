"""Statistics as safetensors files with their weights' fingerprint, data and sample count as metadata.

Other programs can read them: `safetensors.torch.load_file` gives the tensors, and the file's metadata have one JSON
value under ``coin`` (``statistic``, ``kind``, ``task``, ``data``, ``samples``, ``passes``, ``seconds``, and
``weights``, the fingerprint of the network's tensors). A Fisher holds the mean over the samples of the squared
derivatives of the kind's outputs by every parameter; a Gram file for the weight of every linear map the mean of
Σ_positions a aᵀ, [G, K, K], of its inputs (`coin.statistics.gram_sums`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from coin.core.choices import parse_enum
from coin.errors import ConfigurationError, FileError, StateError
from coin.files.safetensors import StateFile, save_state
from coin.files.tensors import State, check_finite, fingerprint
from coin.statistics.cotangents import FisherKind
from coin.statistics.statistic import Statistic, StatisticKind
from coin.statistics.sums import TRANSPOSED, Sums

StatisticPaths = Mapping[Statistic, Mapping[str, Path]]
"""The files of every expert's statistics, by task."""


class StatisticFile(NamedTuple):
    """A statistic in a file: the mean over samples by name, read on access, and the cost of computing it."""

    values: StateFile
    samples: int
    seconds: float
    passes: float


def open_statistic(path: Path, *, statistic: str, weights: str | None = None) -> StatisticFile:
    """Open the file of a ``fisher`` or ``gram``, of the weights with a fingerprint; none accepts any.

    Raises FileError where the file is missing, damaged, of another statistic or of other weights, or a Fisher has a
    negative number; StateError where a number is not finite.
    """
    values = _opened(path, [statistic], weights, "run coin fisher again")
    check_finite(values, f"the {statistic} in '{path}'")
    if statistic == "fisher" and (name := _negative(values)):
        raise FileError(f"'{path}' holds a negative number in '{name}', expected squares; run coin fisher again")
    made = values.provenance
    try:
        return StatisticFile(values, int(made["samples"]), float(made["seconds"]), float(made["passes"]))
    except (KeyError, TypeError, ValueError) as error:
        found = f"'{path}' does not say its samples, seconds, passes as numbers"
        raise FileError(f"{found}; run coin fisher again") from error


def open_statistics(paths: StatisticPaths, which: Statistic, weights: Mapping[str, str]) -> list[StatisticFile]:
    """Open one statistic of every expert, and check that it is of the weights with these fingerprints, by task."""
    own = paths.get(which, {})
    if missing := [task for task in weights if task not in own]:
        found = f"found no {which} of expert '{missing[0]}', which the method needs"
        raise ConfigurationError(f"{found}; run coin fisher on it and name the file")
    return [open_statistic(own[task], statistic=which.name, weights=mark) for task, mark in weights.items()]


def save_statistic(
    path: Path | str, values: State | Sums, network: nn.Module, *, kind: FisherKind | str = FisherKind.exact,
    **provenance: Any,
) -> None:  # fmt: skip
    """Write a network's Fisher diagonal or Gram matrices, with the fingerprint of the weights that they are of.

    Args:
        path: The file, safetensors.
        values: What `fisher_diagonal` or ``gram_sums(…).mean()`` returns, the mean over samples by name; or sums.
        network: The network, with the weights that it had then.
        kind: Which Fisher it is; nothing of Gram matrices.
        **provenance: Further JSON values of the file's metadata.

    Raises StateError where a tensor fits no parameter of the network, a number is not finite, or a Fisher negative;
    FileError where the file cannot be written.

    >>> coin.save_statistic("fisher.safetensors", coin.fisher_diagonal(experts[0], inputs[0]), experts[0])
    """
    spent = {"samples": values.count, "passes": values.passes} if isinstance(values, Sums) else {}
    state = values.mean() if isinstance(values, Sums) else values
    name = _checked_kind(state, network)
    described = {"statistic": str(name), "weights": fingerprint(network.state_dict())}
    if name is StatisticKind.fisher:
        described["kind"] = str(parse_enum(FisherKind, "kind", kind))
    save_state(Path(path), state, {**provenance, **spent, **described})


def load_statistic(path: Path | str, network: nn.Module) -> dict[str, Tensor]:
    """Return a network's Fisher diagonal or Gram matrices from a file of `save_statistic` or of ``coin fisher``.

    Raises FileError where the file is missing, damaged, no statistic or of other weights than the network's, StateError
    where a tensor does not fit the network.

    >>> coin.save_statistic("fisher.safetensors", coin.fisher_diagonal(experts[0], inputs[0]), experts[0])
    >>> coin.load_statistic("fisher.safetensors", experts[0])["bias"]
    tensor([1., 1., 1.])
    """
    weights = fingerprint(network.state_dict())
    state = dict(_opened(Path(path), list(StatisticKind), weights, "compute the statistic again"))
    _checked_kind(state, network)
    return state


def _opened(path: Path, statistics: list[Any], weights: str | None, advice: str) -> StateFile:
    """Open a file, which must hold one of these statistics, of the weights with a fingerprint; none accepts any."""
    values = StateFile(path)
    if (found := values.provenance.get("statistic")) not in statistics:
        expected = f"expected {' or '.join(statistics)}; give a file of coin fisher or save_statistic"
        raise FileError(f"'{path}' holds {found or 'no statistic'}, {expected}")
    if weights is not None and (found := values.provenance.get("weights")) != weights:
        marks = f"{str(found)[:12]}…, expected {weights[:12]}…"
        raise FileError(f"'{path}' is of weights {marks}: the expert has changed since; {advice}")
    return values


def _checked_kind(state: State, network: nn.Module) -> StatisticKind:
    """Return which statistic it is, after checking that it fits the network's parameters."""
    parameters, fisher = dict(network.named_parameters(remove_duplicate=False)), True
    for name, tensor in state.items():
        if (own := parameters.get(name.removesuffix(TRANSPOSED))) is None:
            found = f"the statistic has a tensor '{name}', which {type(network).__name__} has not"
            raise StateError(f"{found}; give its own")
        is_like = name in parameters and own.shape == tensor.shape
        if not is_like and (tensor.ndim != 3 or tensor.shape[1] != tensor.shape[2]):
            expected = f"expected {list(own.shape)} of a Fisher, or [G, K, K] of Gram matrices"
            raise StateError(f"the statistic's '{name}' is {list(tensor.shape)}, {expected}; give the network's own")
        fisher &= is_like
    check_finite(state, "the statistic")
    if fisher and (negative := _negative(state)):
        raise StateError(f"the Fisher is negative in '{negative}', expected mean squares")
    return StatisticKind.fisher if fisher else StatisticKind.gram


def _negative(state: State) -> str | None:
    """Return the name of the first tensor with a negative entry."""
    return next((name for name, tensor in state.items() if bool((tensor < 0).any())), None)
