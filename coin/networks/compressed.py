"""Compressed networks: the difference from a base that is stored anyway, in few bits."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from coin.core.devices import device_of
from coin.errors import CoinWarning, ConfigurationError, FileError, StateError
from coin.files.safetensors import StateFile, save_state
from coin.files.tensors import check_finite, check_layout, fingerprint
from coin.networks.adapter import Adapter, adapters_state, split_adapters
from coin.networks.batchnorm import folded_norms, mark_folded
from coin.networks.calling import clone
from coin.networks.delta import (
    Rounded,
    is_smaller_rounded,
    matrix_shape,
    quantise,
)
from coin.networks.heads import head_name, pad_head
from coin.networks.kept import Kept, keep, not_makeable, tied_names
from coin.networks.weights import fill_network

_PACKED = "packed."  # before the names of the compressed tensors in a file
_BASES = {32: "-delta", 8: "-int8base", 0: ""}


@dataclass(frozen=True)
class Compression:
    """How a network is compressed.

    Args:
        bits: 1 … 8 bits a value.
        base_bits: How the base is kept: 32: as it is; 8: in 8 bits a value, from which the delta is then taken; 0: not
            at all, so that this is plain quantisation of the network.
    """

    bits: int
    base_bits: int = 32

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in range(1, 9):
            raise ConfigurationError(f"found bits={self.bits}, expected a whole number from 1 to 8")
        if self.base_bits not in _BASES:
            raise ConfigurationError(f"found base_bits={self.base_bits!r}, expected 32, 8 or 0")

    @classmethod
    def of(cls, options: "Compression | Mapping[str, Any]") -> Self:
        """Return a section of options as an object."""
        if isinstance(options, cls):
            return options
        try:
            return cls(**cast(Any, options))
        except TypeError as error:
            raise ConfigurationError(
                f"found {options!r:.100}, expected bits and base_bits"
            ) from error

    @classmethod
    def of_body(cls, options: Any) -> Self:
        """Return a method's section of options as an object; a body has no base."""
        if not isinstance(options, Mapping) or set(options) != {"bits"}:
            raise ConfigurationError(f"found {options!r:.100}, expected {{bits: 4}} or so")
        return cls(options["bits"], base_bits=0)

    @property
    def name(self) -> str:
        """Its name in results and files: ``4bit``, ``3bit-delta``, ``3bit-int8base``."""
        return f"{self.bits}bit{_BASES[self.base_bits]}"


@dataclass(eq=False, repr=False)
class Compressed:
    """A network in few bits a value, or its delta from a base; made by `compress`.

    Attributes:
        base: The base as stored: rounded to int8 for ``base_bits=8``; for 0 any network of its architecture and
            class count, whose weights are not used.
        base_bits: 32, 8 or 0.
        base_nbytes: The bytes of the base as stored.
        rounded: The matrices, or their deltas, by name, tied ones once.
        others: The other tensors that are not the base's: the deltas of float32 and float64 ones in float16, where that
            holds them to a thousandth; or whole.
        outputs: Of the head; the base's may have others.
        adapters: Of a body, what experts keep beside it.

    >>> coin.compress(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), bits=3)  # of 288 bytes
    Compressed(56 bytes, base of 32 bits)
    """

    base: nn.Module
    base_bits: int
    base_nbytes: int
    rounded: Mapping[str, Rounded]
    others: Mapping[str, Tensor]
    outputs: int | None
    adapters: Sequence[Adapter] = ()

    def __repr__(self) -> str:
        return f"Compressed({self.nbytes} bytes, base of {self.base_bits} bits)"

    @property
    def nbytes(self) -> int:
        """The network's bytes in a file and its adapters', without the base."""
        matrices = sum(rounded.nbytes for rounded in self.rounded.values())
        others = sum(tensor.nbytes for tensor in self.others.values())
        return matrices + others + sum(adapter.nbytes for adapter in self.adapters)

    def network(self) -> nn.Module:
        """Return the decompressed network, a new one in eval mode; a body is without its `adapters`."""
        network = clone(with_outputs(self.base, self.outputs)).eval()
        base = stored(network)
        self._check_layout(base)
        state = {name: self._tensor(name, tensor) for name, tensor in base.items()}
        by_name = {name: state[first] for name, (first, *_) in tied_names(network).items()}
        fill_network(network, by_name, "the compressed network")
        return network

    def _tensor(self, name: str, base: Tensor) -> Tensor:
        """Return a tensor of the network, given the base's."""
        if self.base_bits == 0:
            base = torch.zeros_like(base)
        if name in self.rounded:
            delta = self.rounded[name].dense()
        elif name not in self.others:
            return base
        elif is_wide(base) and self.others[name].dtype == torch.float16:
            delta = self.others[name]
        else:
            return self.others[name]
        return (base + delta.to(base.dtype).view(base.shape)).to(base.dtype)

    @torch.no_grad()
    def packed(self) -> nn.Module:
        """Return the network as it is stored, a new one in eval mode: a matrix is unpacked when a layer reads it.

        Parameters that are `not_makeable` are whole; a warning names them. Raises ConfigurationError for a delta.
        """
        if self.base_bits:
            raise ConfigurationError(
                f"found a delta from a base of {self.base_bits} bits, expected base_bits=0; give its network()"
            )
        refused = not_makeable(self.base)
        network = clone(self.base, shared=not refused).eval()
        own = stored(network)
        self._check_layout(own)
        tied = tied_names(network)
        state = network.state_dict()
        whole: list[str] = []
        for name, tensor in own.items():
            is_makeable = refused.isdisjoint(tied[name])
            if name in self.rounded and is_makeable:
                kept = Kept(network.get_parameter(name), self.rounded[name])
                keep(network, tied[name], kept)
                continue
            if name in self.rounded:
                whole.append(name)
            value = self._tensor(name, tensor)
            if is_makeable:
                _replace(network, tied[name], value)  # the base's own tensors stay as they are
            else:
                state[name].copy_(value)  # other attributes hold this very tensor
        if whole:
            warnings.warn(
                f"{type(network).__name__} is held packed but for {', '.join(map(repr, whole))}, which containers own "
                "or other attributes hold too, as those of LSTMs",
                CoinWarning,
                stacklevel=2,
            )
        return network

    def _check_layout(self, like: Mapping[str, Tensor]) -> None:
        """Raise StateError where the compressed tensors are not of names and shapes like these."""
        found = {name: tuple(rounded.levels.shape) for name, rounded in self.rounded.items()}
        expected = {name: matrix_shape(like[name].shape) for name in found if name in like}
        others = {name: tensor.shape for name, tensor in self.others.items()}
        expected_others = {name: like[name].shape for name in others if name in like}
        if found != expected or others != expected_others:
            kind = type(self.base).__name__
            raise StateError(
                f"the compressed tensors are not those of a {kind}; give a base of its architecture"
            )

    def save(self, path: Path | str, provenance: Mapping[str, Any] | None = None) -> None:
        """Write the file. With ``base_bits=8`` the base is not in it; `load` rounds it again."""
        state = {f"{_PACKED}{name}": tensor for name, tensor in self.others.items()}
        for name, rounded in self.rounded.items():
            state[f"{_PACKED}{name}.codes"] = rounded.packed()
            state[f"{_PACKED}{name}.scale"] = rounded.scale
        state |= adapters_state(self.adapters)
        own = {
            "base": fingerprint(self.base.state_dict()) if self.base_bits else None,
            "base_bits": self.base_bits,
            "base_nbytes": self.base_nbytes,
            "bits": {name: rounded.bits for name, rounded in self.rounded.items()},
            "outputs": self.outputs,
            "adapters": len(self.adapters),
            "folded": folded_norms(self.base),
        }
        described = {**(provenance or {}), "compressed": own}
        save_state(Path(path), state, described)

    @classmethod
    def load(cls, path: Path | str, base: nn.Module, hashed: str | None = None) -> Self:
        """Load a compressed network, given its base: the original one for an int8 base, one like it for 0 bits.

        `hashed` is the base's fingerprint, where it is known.
        """
        file = StateFile(Path(path))
        told = file.provenance.get("compressed")
        if told is None:
            raise FileError(f"'{path}' holds no compressed network, expected one that coin wrote")
        base_bits = told["base_bits"]
        expected = told["base"]
        found = None
        if base_bits:
            found = hashed or fingerprint(base.state_dict())
        if base_bits == 8 and found != expected:
            base = int8(base).network()
            found = fingerprint(base.state_dict())
        if found != expected:
            raise FileError(
                f"'{path}' is a delta from the base {expected:.12}, found {found:.12}; give its own base"
            )
        if told["folded"]:
            base = clone(base, shared=True)  # the caller's stays unmarked
            mark_folded(base, told["folded"])
        names, adapters = split_adapters(file, told["adapters"])
        others = {name.removeprefix(_PACKED): file[name].clone() for name in names}
        rounded = {}
        like = with_outputs(base, told["outputs"]).state_dict()
        for name, bits in told["bits"].items():
            codes = others.pop(f"{name}.codes")
            scale = others.pop(f"{name}.scale")
            columns = matrix_shape(like[name].shape)[1]
            rounded[name] = Rounded.unpacked(codes, scale, bits, columns)
        nbytes = told["base_nbytes"]
        return cls(base, base_bits, nbytes, rounded, others, told["outputs"], adapters)


def is_wide(tensor: Tensor) -> bool:
    """Say whether a tensor is of a type of which float16 keeps the deltas."""
    return tensor.dtype in (torch.float32, torch.float64)


def compress(
    network: nn.Module,
    base: nn.Module | None,
    *,
    bits: int,
    base_bits: int = 32,
    rounded: Mapping[str, Rounded] | None = None,
) -> Compressed:
    """Compress a network: alone, or an expert to its delta from a base, the shared initialisation.

    Kernels are flattened to a matrix with a row an output, and rounded to few bits a value with a scale a row
    (`coin.networks.delta.quantise`). The base's head may have fewer or more outputs: the rows beyond its own are
    zero.

    Args:
        network: The network.
        base: What it was fine-tuned from; not needed for ``base_bits=0``.
        bits: 1 … 8 bits a value.
        base_bits: How the base is stored: 32: unchanged; 8: in 8 bits a value, from which the delta is; 0: not at all.
        rounded: Deltas that are already rounded, by tensor; used unchanged.

    Raises ConfigurationError where an option is wrong or there is no base, StateError where network and base differ in
    more than the outputs of their heads, or are not finite.

    >>> base = torch.nn.Linear(64, 32)
    >>> coin.compress(torch.nn.Linear(64, 32), base, bits=3).network().weight.shape
    torch.Size([32, 64])
    """
    Compression(bits, base_bits)  # checks them
    own = stored(network)
    buffers = dict(network.named_buffers())  # such as masks, which may be infinite
    check_finite(own, "the network to compress", buffers.keys())
    kept, base_nbytes = _kept_base(network, base, base_bits)
    outputs = None
    shapes = {name: tensor.shape for name, tensor in kept.state_dict().items()}
    if any(shapes.get(name) != tensor.shape for name, tensor in own.items()):
        outputs = getattr(network.get_submodule(head_name(network)), "out_features", None)
    reference = stored(with_outputs(kept, outputs))
    check_layout(own, reference, "the base")
    already = rounded or {}
    matrices: dict[str, Rounded] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in own.items():
        before = reference[name]
        if tensor.dtype != before.dtype:
            found = f"'{name}' is {tensor.dtype}, in the base {before.dtype}"
            raise StateError(f"{found}, expected one type; convert one")
        if base_bits == 0:
            before = torch.zeros_like(tensor)
        is_matrix = name not in buffers and is_smaller_rounded(tensor.shape, bits)
        if torch.equal(tensor, before):
            continue
        if name in already:
            matrices[name] = already[name]
        elif tensor.is_floating_point() and is_matrix:
            delta = tensor.float() - before.float()
            matrices[name] = quantise(delta.reshape(matrix_shape(tensor.shape)), bits)
        else:
            others[name] = _as_half(tensor, before, name in buffers)
    return Compressed(kept, base_bits, base_nbytes, matrices, others, outputs)


def _as_half(tensor: Tensor, base: Tensor, is_buffer: bool) -> Tensor:
    """Return a tensor's delta in float16, or the tensor where it is of another type or that loses a thousandth.

    A thousandth is of the largest of a parameter's values, and of every single one of a buffer's.
    """
    if not is_wide(tensor):
        return tensor
    delta = tensor - base
    half = delta.half()
    size = delta.abs().max()
    if is_buffer:
        size = torch.maximum(delta.abs(), tensor.abs())
    is_close = (half - delta).abs() <= size / 1000  # nor is it where a mask is infinite
    return half if bool(is_close.all()) else tensor


def with_outputs(network: nn.Module, outputs: int | None) -> nn.Module:
    """Return a network with a head of so many outputs, its first rows and then zeros; None for its own."""
    return network if outputs is None else pad_head(network, outputs)


def _kept_base(network: nn.Module, base: nn.Module | None, base_bits: int) -> tuple[nn.Module, int]:
    """Return the base as it is kept, on the CPU, and its bytes; without one the network itself, and 0."""
    if base_bits == 0:
        return _on_cpu(network), 0
    if base is None:
        raise ConfigurationError(
            f"found no base and base_bits={base_bits}, expected a base; give it, or base_bits=0"
        )
    state = stored(base)
    check_finite(state, "the base", [name for name, _ in base.named_buffers()])
    if base_bits == 8:
        rounded = int8(base)
        return rounded.network(), rounded.nbytes
    return _on_cpu(base), sum(tensor.nbytes for tensor in state.values())


def _replace(network: nn.Module, names: Sequence[str], value: Tensor) -> None:
    """Give a network, in place, another tensor for a parameter or buffer, by all its tied names."""
    place, _, attribute = names[0].rpartition(".")
    own = getattr(network.get_submodule(place), attribute)
    made = value
    if isinstance(own, nn.Parameter):
        made = nn.Parameter(value, requires_grad=own.requires_grad)
    for name in names:
        place, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(place), attribute, made)


def int8(base: nn.Module) -> Compressed:
    """Return a base as it is kept for ``base_bits=8``: a network of its own in 8 bits a value."""
    return compress(base, None, bits=8, base_bits=0)


def stored(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors, tied ones once, on the CPU."""
    tensors: dict[str, Tensor] = {}
    tied = tied_names(network)
    for name, tensor in network.state_dict().items():
        if name == tied[name][0]:
            tensors[name] = tensor.detach().cpu()
    return tensors


def _on_cpu(network: nn.Module) -> nn.Module:
    """Return a network on the CPU, itself if it is there."""
    if device_of(network).type == "cpu":
        return network
    return clone(network).cpu()
