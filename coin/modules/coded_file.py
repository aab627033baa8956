"""A coded system as one safetensors file: its code, its coded models and its fitted decoders, without the experts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from coin.coding import Code
from coin.coding.decoder_state import decoders_state, restore_decoders
from coin.core.batches import Forward, clone
from coin.errors import FileError, StateError
from coin.files.safetensors import load_state, save_state
from coin.files.tensors import State, check_same_layout, fingerprint
from coin.merging.method import fill
from coin.networks.experts import tensors_of
from coin.networks.heads import of_one_width

if TYPE_CHECKING:
    from coin.modules.coded import Coded

System = TypeVar("System", bound="Coded")
_SYSTEM = "coded system"


def save_system(system: "Coded", path: Path) -> None:
    """Write a system; see `Coded.save`."""
    fitted, rests = decoders_state(list(system.decoders.values()))
    state = {f"decoder.{name}": tensor for name, tensor in fitted.items()}
    for row, network in enumerate(system.coded):
        state |= {f"coded.{row}.{name}": tensor for name, tensor in _tensors_of(network).items()}
    provenance = {
        "what": _SYSTEM,
        "code": system.code.matrix.tolist(),
        "names": system.names,
        "classes": system.classes,
        "decoders": rests,
        "experts": [fingerprint(_tensors_of(each)) for each in system.experts],
    }
    infinite = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.isinf().any()]
    save_state(path, state, provenance, infinite)


def load_system(
    kind: type[System],
    path: Path,
    experts: Sequence[nn.Module],
    coded: Sequence[nn.Module] | None,
    forward: Forward | None,
) -> System:
    """Return the system of a file; see `Coded.load`, whose class is the `kind`."""
    state, told = load_state(path)
    if told.get("what") != _SYSTEM:
        raise FileError(f"'{path}' holds no coded system, expected a file that Coded.save wrote")
    found = [fingerprint(_tensors_of(expert)) for expert in experts]
    pairs = enumerate(zip(found, told["experts"], strict=False))
    if other := [place for place, (own, expected) in pairs if own != expected]:
        found_other = f"expert {other[0]} is not the one that '{path}' was saved with"
        raise StateError(f"{found_other}; give those experts, or make the system anew")
    code = Code(told["code"])
    networks = coded or [clone(of_one_width(experts)[0]).eval() for _ in range(code.num_coded)]
    system = kind(code, experts, networks, told["names"], forward)
    for row, network in enumerate(networks):
        own = _below(f"coded.{row}.", state)
        check_same_layout([_tensors_of(network), own], ["the network", f"coded model {row} of '{path}'"])
        fill(network, own)
    restored = restore_decoders(_below("decoder.", state), told["decoders"], code)
    system.decoders, system.classes = {decoder.erased: decoder for decoder in restored}, told["classes"]
    return system


def _below(prefix: str, state: State) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters and buffers by name, tied ones once, non-persistent ones included."""
    parameters, buffers = tensors_of(network)
    return {**parameters, **buffers}
