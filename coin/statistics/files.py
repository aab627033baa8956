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
from coin.statistics.sums import TRANSPOSED, Sums

StatisticPaths = Mapping[Statistic, Mapping[str, Path]]  # the files of every expert's statistics, by task


def open_statistic(path: Path, statistic: str | None = None, weights: str | None = None) -> StateFile:
    """Open the file of a ``fisher`` or ``gram``, of the weights with a fingerprint; none accepts any.

    Raises FileError where the file is missing, damaged, of another statistic or of other weights; StateError where a
    number is not finite, or negative in a Fisher.
    """
    values, kinds = StateFile(path), [statistic] if statistic else [*StatisticKind]
    if (found := values.provenance.get("statistic")) not in kinds:
        expected = f"expected {' or '.join(kinds)}; give a file of coin fisher or save_statistic"
        raise FileError(f"'{path}' holds {found or 'no statistic'}, {expected}")
    if weights is not None and (own := str(values.provenance.get("weights"))) != weights:
        marks = f"{own[:12]}…, expected {weights[:12]}…: the expert has changed since"
        raise FileError(f"'{path}' is of weights {marks}; run coin fisher again")
    _check_numbers(values, found == StatisticKind.fisher, f"the {found} in '{path}'")
    return values


def open_statistics(paths: StatisticPaths, which: Statistic, weights: Mapping[str, str]) -> list[StateFile]:
    """Open one statistic of every expert, and check that it is of the weights with these fingerprints, by task."""
    own = paths.get(which, {})
    if missing := [task for task in weights if task not in own]:
        found = f"found no {which} of expert '{missing[0]}', which the method needs"
        raise ConfigurationError(f"{found}; run coin fisher on it and name the file")
    return [open_statistic(own[task], which.name, mark) for task, mark in weights.items()]


def save_statistic(
    path: Path | str, values: State | Sums, network: nn.Module, *, kind: FisherKind | str = FisherKind.exact,
    **provenance: Any,
) -> None:  # fmt: skip
    """Write a network's Fisher diagonal or Gram matrices, with the fingerprint of the weights that they are of.

    `values` are what `fisher_diagonal` or ``gram_sums(…).mean()`` returns, the mean over samples by name, or sums; of
    a Fisher of this kind. `provenance` is further JSON values of the file's metadata.

    Raises StateError where a tensor fits no parameter of the network, a number is not finite, or a Fisher negative;
    FileError where the file cannot be written.

    >>> coin.save_statistic("fisher.safetensors", coin.fisher_diagonal(experts[0], inputs[0]), experts[0])
    """
    spent = {"samples": values.count, "passes": values.passes} if isinstance(values, Sums) else {}
    state = values.mean() if isinstance(values, Sums) else values
    name = check_statistic(state, network)
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
    state = dict(open_statistic(Path(path), weights=fingerprint(network.state_dict())))
    check_statistic(state, network)
    return state


def check_statistic(state: State, network: nn.Module, what: str = "the statistic") -> StatisticKind:
    """Return which statistic it is, after checking its numbers, and that it fits the network's parameters."""
    parameters, fisher = dict(network.named_parameters(remove_duplicate=False)), True
    for name, tensor in state.items():
        if (own := parameters.get(name.removesuffix(TRANSPOSED))) is None:
            raise StateError(f"{what} has a tensor '{name}', which {type(network).__name__} has not; give its")
        is_like = name in parameters and own.shape == tensor.shape
        if not is_like and (tensor.ndim != 3 or tensor.shape[1] != tensor.shape[2]):
            expected = f"expected {list(own.shape)} of a Fisher, or [G, K, K] of Gram matrices"
            raise StateError(f"{what} has '{name}' of {list(tensor.shape)}, {expected}; give the network's own")
        fisher &= is_like
    _check_numbers(state, fisher, what)
    return StatisticKind.fisher if fisher else StatisticKind.gram


def _check_numbers(state: State, squares: bool, what: str) -> None:
    """Raise StateError where a number is not finite, or one of what should be squares is negative."""
    check_finite(state, what)
    for name, tensor in state.items() if squares else ():
        if bool((tensor < 0).any()):
            raise StateError(f"{what} is negative in '{name}', expected mean squares; compute it again")
