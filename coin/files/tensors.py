"""Named tensors, ``Mapping[str, Tensor]``: checks, arithmetic and fingerprints."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from coin.errors import StateError

State = Mapping[str, Tensor]


def on_device(state: State, device: torch.device) -> State:
    """Return a state on a device; for the CPU one of a file is still read on access."""
    if isinstance(state, dict) or device.type != "cpu":
        return {name: tensor.to(device) for name, tensor in state.items()}
    return state


def check_tensors(state: Mapping[str, object]) -> None:
    """Raise a StateError where a state holds more than tensors, as that of a module with `get_extra_state` does."""
    for name, entry in state.items():
        if not isinstance(entry, Tensor):
            raise StateError(
                f"found '{name}' of type {type(entry).__name__} in a network's state, expected tensors alone; take out "
                "get_extra_state, or register a buffer instead"
            )


def check_layout(own: State, state: State, source: str) -> None:
    """Raise a StateError unless a state, from `source`, has the names and shapes of another, a network's `own`."""
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    problem = ""
    if missing:
        problem = f"has no tensor '{missing[0]}' ({len(missing)} missing)"
    elif extra:
        problem = f"has a tensor '{extra[0]}' too many ({len(extra)} in all)"
    if problem:
        raise StateError(
            f"'{source}' {problem}; it is of another architecture: give one of the same network.name and "
            "network.options"
        )
    for name, tensor in own.items():
        found = list(state[name].shape)
        expected = list(tensor.shape)
        if found != expected:
            raise StateError(
                f"'{source}' has tensor '{name}' of shape {found}, expected {expected}; it has another architecture or "
                "another number of classes: give one of the same"
            )


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, one that is there several times once."""
    distinct = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.nbytes for tensor in distinct.values())


def not_finite(state: State, infinite: Collection[str] = ()) -> str | None:
    """Return the name of the first tensor with a NaN, or an infinity unless named in `infinite`; None without."""
    for name, tensor in state.items():
        is_number = ~tensor.isnan() if name in infinite else tensor.isfinite()
        if not bool(is_number.all()):
            return name
    return None


def check_finite(state: State, what: str, infinite: Collection[str] = ()) -> None:
    """Raise a StateError, about `what`, that names the tensor `not_finite` finds."""
    name = not_finite(state, infinite)
    if name is not None:
        raise StateError(
            f"{what} is not finite: tensor '{name}' holds a NaN or an infinity; check what made it"
        )


def weighted_sum(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return Σ_i w_i · state_i, tensor by tensor, for weights that sum to 1; a StateError where names or shapes differ.

    Entries that agree in all states stay, to the last bit and infinities included, and a state of weight zero has no
    say. Of BatchNorm's ``num_batches_tracked`` the maximum is taken; a StateError where other integers differ.
    """
    for index, state in enumerate(states):
        check_layout(states[0], state, f"state {index}")
    return {key: weighted_mean(states, weights, key) for key in states[0]}


def weighted_mean(
    states: Sequence[State],
    weights: Sequence[float],
    key: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return one tensor of `weighted_sum`, summed in its own type or in `dtype`, if that is wider."""
    first = states[0][key]
    if dtype is not None:
        first = first.to(torch.promote_types(first.dtype, dtype))
    is_count = not (first.is_floating_point() or first.is_complex())
    total = first.clone() if is_count else torch.zeros_like(first)
    agree = torch.ones_like(first, dtype=torch.bool)
    for state, weight in zip(states, weights, strict=True):
        tensor = state[key].to(first.dtype)  # one at a time: states may lie in files
        agree &= tensor == first
        if is_count:
            total = torch.maximum(total, tensor)
        elif weight != 0:  # zero times an infinity is NaN
            total.add_(tensor, alpha=weight)
    if is_count and not key.endswith("num_batches_tracked") and not bool(agree.all()):
        raise StateError(
            f"'{key}', {first.dtype}, differs between experts and has no average; give experts of one"
        )
    return torch.where(agree, first, total)


def fingerprint(state: State) -> str:
    """Return a SHA-256 over names, types, shapes and values, which identifies weights wherever they are kept."""
    check_tensors(state)
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        described = f"{name}:{tensor.dtype}:{[*tensor.shape]};"
        values = tensor.reshape(-1).view(torch.uint8)
        digest.update(described.encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()
