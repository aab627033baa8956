"""Named tensors: checks, arithmetic, and safetensors files that say where they came from.

Parameters, buffers and statistics all travel as ``Mapping[str, Tensor]``. Names and shapes are checked before any
arithmetic, so that a mistake ends in one line that names the tensor.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coin.atomic import atomic_path
from coin.errors import FileError, StateError
from coin.versions import versions

State = Mapping[str, Tensor]

_METADATA_KEY = "coin"
_ALIKE = "give tensors of one architecture and class count"


def check_same_layout(states: Sequence[State], names: Sequence[str] | None = None) -> None:
    """Check that all states hold the same tensor names with the same shapes.

    Args:
        states: At least one state.
        names: What to call each state in the message; ``state 0``, ``state 1``, … otherwise.

    Raises:
        StateError: A name is missing or superfluous, or a shape differs; the message names the first such tensor.
    """
    if not states:
        raise StateError("found no states, expected at least one")
    called = list(names) if names is not None else [f"state {i}" for i in range(len(states))]
    first = states[0]
    for other, name in zip(states[1:], called[1:], strict=True):
        if missing := sorted(first.keys() - other.keys()):
            raise StateError(
                f"{name} has no tensor '{missing[0]}', which {called[0]} has ({len(missing)} missing); {_ALIKE}"
            )
        if extra := sorted(other.keys() - first.keys()):
            raise StateError(
                f"{name} has a tensor '{extra[0]}', which {called[0]} has not ({len(extra)} superfluous); {_ALIKE}"
            )
        for key, tensor in first.items():
            if other[key].shape != tensor.shape:
                raise StateError(
                    f"tensor '{key}' is {list(other[key].shape)} in {name} but {list(tensor.shape)} in {called[0]}; "
                    f"{_ALIKE}"
                )


def not_finite(state: State, infinite: Collection[str] = ()) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity, None if none does.

    Args:
        state: Named tensors.
        infinite: Names of tensors that may hold infinities, as a causal mask does, but no NaN.
    """
    for key, tensor in state.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # A NaN or an infinity shows in the sum, which takes a tenth of the time; only a sum can overflow, too.
        if bool(torch.isfinite(tensor.sum())):
            continue
        wrong = torch.isnan(tensor).any() if key in infinite else ~torch.isfinite(tensor).all()
        if bool(wrong):
            return key
    return None


def check_finite(state: State, what: str, infinite: Collection[str] = ()) -> None:
    """Check that no tensor holds a NaN or an infinity; those named in `infinite` may hold infinities.

    Raises:
        StateError: Naming the first tensor that does, and `what` it belongs to.
    """
    if (key := not_finite(state, infinite)) is not None:
        raise StateError(f"{what} is not finite: tensor '{key}' holds a NaN or an infinity; check what made it")


def weighted_sum(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return Σ_i w_i · state_i, tensor by tensor, for weights that sum to 1.

    Entries that agree in all states stay as they are, to the last bit and infinities included, and a state of weight
    zero has no say. Floating-point and complex tensors are summed in their own type; of others (BatchNorm's
    ``num_batches_tracked``) the maximum over the states is taken, since a weighted count has no meaning.

    Raises:
        StateError: The states' names or shapes differ.
    """
    check_same_layout(states)
    if len(states) != len(weights):
        raise StateError(f"found {len(weights)} weights for {len(states)} states, expected one each; give as many")
    return {key: _weighted(states, weights, key) for key in states[0]}


def _weighted(states: Sequence[State], weights: Sequence[float], key: str) -> Tensor:
    first = states[0][key]
    summed = first.is_floating_point() or first.is_complex()
    total = torch.zeros_like(first) if summed else first.clone()
    agree = torch.ones_like(first, dtype=torch.bool)
    for state, weight in zip(states, weights, strict=True):
        tensor = state[key]  # one at a time: states may lie in files
        agree &= tensor == first
        if not summed:
            total = torch.maximum(total, tensor)
        elif weight != 0:  # zero times an infinity is NaN
            total.add_(tensor, alpha=weight)
    return torch.where(agree, first, total)


def fingerprint(state: State) -> str:
    """Return a SHA-256 over names, types, shapes and values: two networks are the same if and only if theirs agree.

    A file's own hash would change with its metadata; this one identifies the weights wherever they are kept.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_state(path: Path, state: State, provenance: Mapping[str, Any], infinite: Collection[str] = ()) -> None:
    """Write named tensors and one JSON value that says what made them.

    Args:
        path: The file, written under a temporary name and renamed.
        state: Tensors of any shape and type; they are copied to contiguous CPU memory.
        provenance: Anything that JSON holds; `versions()` is added under ``versions``.
        infinite: Names of tensors that may hold infinities.

    Raises:
        StateError: A tensor is not finite: such a file is never written.
        FileError: The file cannot be written.
    """
    check_finite(state, f"the state for '{path}'", infinite)
    metadata = {_METADATA_KEY: json.dumps({**provenance, "versions": versions()}, sort_keys=True)}
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for key, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        # safetensors takes no two tensors of one storage, as tied parameters are, nor a part of one.
        shared = place in written or plain.nbytes != plain.untyped_storage().nbytes()
        tensors[key] = plain.clone() if shared else plain
        written.add(place)
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise FileError(
                f"cannot write '{path}': {error}; free the space or choose a folder you can write to"
            ) from error


def load_provenance(path: Path) -> dict[str, Any]:
    """Return the JSON value that `save_state` wrote with a file, without reading its tensors.

    Raises:
        FileError: The file is missing, damaged, or was not written by ``coin``.
    """
    with _opened(path) as file:
        return provenance_in(file.metadata(), path)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the provenance of a file that `save_state` wrote.

    Raises:
        FileError: The file is missing, damaged, or was not written by ``coin``.
    """
    with _opened(path) as file:
        provenance = provenance_in(file.metadata(), path)
        return {key: file.get_tensor(key) for key in file.keys()}, provenance  # noqa: SIM118 (not a dict)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise missing_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"'{path}' is not a whole safetensors file ({error}); make it again") from error


def missing_file(path: Path) -> FileError:
    """Return the error for a file that is not there."""
    return FileError(f"found no file '{path}', expected a safetensors file; check the path or make it first")


def provenance_in(metadata: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
    """Return the JSON value in a file's metadata.

    Raises:
        FileError: There is none: the file was not written by ``coin``.
    """
    try:
        value = json.loads((metadata or {})[_METADATA_KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise FileError(
            f"'{path}' does not say what made it (no '{_METADATA_KEY}' metadata); make it with coin"
        ) from error
    if not isinstance(value, dict):
        raise FileError(f"'{path}' has '{_METADATA_KEY}' metadata of type {type(value).__name__}, expected an object")
    return value
