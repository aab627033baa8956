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
from coin.networks.calling import clone
from coin.networks.delta import (
    EQUAL,
    Rounded,
    decode,
    encode,
    is_smaller_rounded,
    matrix_shape,
    quantise,
    round_columns,
    size,
    split_matrix,
)
from coin.networks.heads import head_name, replace_head
from coin.networks.kept import Kept, keep, not_makeable, tied_names
from coin.networks.weights import check_plain, fill_network

SHORT = 128  # values of a row below which bodies have it in 8 bits whatever the bits of the others
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
    """A network as packed bytes, a delta from a base; made by `compress`.

    Attributes:
        base: The base as stored: rounded to int8 for ``base_bits=8``; for 0 any network of its architecture and
            class count, whose weights are not used.
        base_bits: 32, 8 or 0.
        base_nbytes: The bytes of the base as stored.
        adapters: Of a body, what experts keep beside it.

    >>> coin.compress(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), bits=3)  # of 288 bytes
    Compressed(56 bytes, base of 32 bits)
    """

    base: nn.Module
    base_bits: int
    base_nbytes: int
    _kinds: dict[str, int]  # how every tensor is stored (`encode`), tied ones once
    _data: dict[str, Tensor]  # and its bytes
    _outputs: int | None  # of the head, where the base's has others
    adapters: Sequence[Adapter] = ()

    def __repr__(self) -> str:
        return f"Compressed({self.nbytes} bytes, base of {self.base_bits} bits)"

    @property
    def nbytes(self) -> int:
        """The network's bytes and its adapters', without the base."""
        own = sum(data.nbytes for data in self._data.values())
        return own + sum(adapter.nbytes for adapter in self.adapters)

    def network(self) -> nn.Module:
        """Return the decompressed network, a new one in eval mode; a body is without its `adapters`."""
        network = clone(self.base).eval()
        if self._outputs is not None:
            with torch.random.fork_rng(devices=[]):
                replace_head(network, self._outputs)
        own = stored(network)
        self._check_layout(own)
        reference = _reference(own, network, self.base) if self.base_bits else _zeros(own)
        state: dict[str, Tensor] = {}
        for name, (first, *_) in tied_names(network).items():
            state[name] = decode(self._kinds[first], self._data[first], reference[first])
        fill_network(network, state, "the compressed network")
        return network

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
            kind = self._kinds[name]
            data = self._data[name]
            is_matrix = 1 <= kind <= 8
            if is_matrix and refused.isdisjoint(tied[name]):
                codes, scale = split_matrix(data, tensor.shape)
                kept = Kept(network.get_parameter(name), codes.clone(), scale, kind)
                keep(network, tied[name], kept)
                continue
            if is_matrix:
                whole.append(name)
            value = decode(kind, data, torch.zeros_like(tensor))
            if refused.isdisjoint(tied[name]):
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
        """Raise StateError where the compressed tensors are not of names and sizes like these."""
        found = {name: data.nbytes for name, data in self._data.items()}
        expected = {
            name: size(self._kinds.get(name, EQUAL), tensor) for name, tensor in like.items()
        }
        if found != expected:
            kind = type(self.base).__name__
            raise StateError(
                f"the compressed tensors are not those of a {kind}; give a base of its architecture"
            )

    def save(self, path: Path | str, provenance: Mapping[str, Any] | None = None) -> None:
        """Write the file. With ``base_bits=8`` the base is not in it; `load` rounds it again."""
        state = {_PACKED + name: data for name, data in self._data.items()}
        state |= adapters_state(self.adapters)
        own = {
            "base": fingerprint(self.base.state_dict()) if self.base_bits else None,
            "base_bits": self.base_bits,
            "base_nbytes": self.base_nbytes,
            "kinds": self._kinds,
            "outputs": self._outputs,
            "adapters": len(self.adapters),
        }
        save_state(Path(path), state, {**(provenance or {}), "compressed": own})

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
        names, adapters = split_adapters(file, told["adapters"])
        data = {name.removeprefix(_PACKED): file[name].clone() for name in names}
        return cls(
            base,
            base_bits,
            told["base_nbytes"],
            told["kinds"],
            data,
            told["outputs"],
            adapters,
        )


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
    check_plain(network)
    own = stored(network)
    buffers = dict(network.named_buffers())  # such as masks, which may be infinite
    check_finite(own, "the network to compress", buffers.keys())
    kept, base_nbytes = _kept_base(network, base, base_bits)
    reference = _reference(own, network, kept) if base_bits else _zeros(own)
    rounded = rounded or {}
    of_base = stored(kept)
    outputs = None
    kinds: dict[str, int] = {}
    data: dict[str, Tensor] = {}
    for name, tensor in own.items():
        bits_of_matrix = None if name in buffers else bits
        kinds[name], data[name] = encode(tensor, reference[name], bits_of_matrix, rounded.get(name))
        if tensor.shape != of_base[name].shape:  # of the head
            outputs = len(tensor)
    return Compressed(kept, base_bits, base_nbytes, kinds, data, outputs)


def _kept_base(network: nn.Module, base: nn.Module | None, base_bits: int) -> tuple[nn.Module, int]:
    """Return the base as it is kept, on the CPU, and its bytes; without one the network itself, and 0."""
    if base_bits == 0:
        return _on_cpu(network), 0
    if base is None:
        raise ConfigurationError(
            f"found no base and base_bits={base_bits}, expected a base; give it, or base_bits=0"
        )
    check_plain(base)
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


def _zeros(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what tensors are a delta from that have no base."""
    return {name: torch.zeros_like(tensor) for name, tensor in own.items()}


def _reference(own: Mapping[str, Tensor], network: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """Return the base's tensors that a network's `stored` tensors are a delta from."""
    state = stored(base)
    are_alike = all(
        name not in state or state[name].shape == tensor.shape for name, tensor in own.items()
    )
    if not are_alike:
        state |= _rows_of_head(state, own, head_name(network))
    check_layout(own, state, "the base")
    for name, tensor in own.items():
        if tensor.dtype != state[name].dtype:
            found = f"'{name}' is {tensor.dtype}, in the base {state[name].dtype}"
            raise StateError(f"{found}, expected one type; convert one")
    return state


def _rows_of_head(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], head: str
) -> dict[str, Tensor]:
    """Return the tensors of a base's head with as many rows as a network's own: the first ones, and then zeros."""
    resized: dict[str, Tensor] = {}
    for name in (f"{head}.weight", f"{head}.bias"):
        if name in own and name in state:
            rows = state[name][: len(own[name])]
            missing = len(own[name]) - len(rows)
            zeros = rows.new_zeros(missing, *rows.shape[1:])
            resized[name] = torch.cat([rows, zeros])
    return resized


class Rounding:
    """Rounds a network's matrices to few bits a value; `rounded` holds those so far."""

    def __init__(self, network: nn.Module, bits: int) -> None:
        self.rounded: dict[str, Rounded] = {}
        self._like = network.state_dict()
        self._bits = bits

    def bits(self, name: str) -> int:
        """Return the bits a value: 8 for short rows, as of depthwise kernels, which few bits cost much."""
        _, columns = matrix_shape(self._like[name].shape)
        return 8 if columns < SHORT else self._bits

    def takes(self, name: str) -> bool:
        """Whether a tensor is a matrix that its rounded form is smaller than in float16."""
        tensor = self._like[name]
        return tensor.is_floating_point() and is_smaller_rounded(tensor.shape, self.bits(name))

    def weight(self, name: str) -> Tensor:
        """Return a rounded weight as it is read back."""
        like = self._like[name]
        return self.rounded[name].dense().reshape(like.shape).to(like.dtype)

    def round(self, name: str, weight: Tensor) -> Tensor:
        """Round a weight to the nearest and return it."""
        matrix = weight.double().reshape(matrix_shape(weight.shape))
        self.rounded[name] = quantise(matrix, self.bits(name)).cpu()
        return self.weight(name)

    def step(self, name: str, weight: Tensor, step: Tensor, metric: Tensor | None) -> Tensor:
        """Round a weight after a step of a regression; return the step [G, O, K] from the weight to its rounded form.

        What is rounded is the weight with the step in it. The step is the best one: another that is off by E costs
        tr(E M Eᵀ) more, summed over groups, which is kept small: later columns make up for the errors of earlier ones
        (`round_columns`).

        Args:
            name: The weight's name.
            weight: The weight before the step [G·O, …], the rows of all G groups in turn.
            step: The step of each group's map [G, O, K].
            metric: M [G, K, K]; without it every value is rounded to the nearest.
        """
        bits = self.bits(name)
        before = weight.double().reshape(step.shape)
        wanted = before + step
        rows = matrix_shape(weight.shape)  # each with a scale
        rounded = quantise(wanted.reshape(rows), bits)
        # A convolution with a single output has a scale for each of its inputs.
        has_row_each = rows[0] == wanted.shape[0] * wanted.shape[1]
        if metric is not None and has_row_each:
            scales = rounded.scale.view(wanted.shape[:2])
            codes = round_columns(wanted, scales, bits, metric)
            rounded = Rounded(codes.reshape(rows), rounded.scale, bits)
        self.rounded[name] = rounded.cpu()
        after = rounded.dense().reshape(step.shape)
        return (after - before).to(step)
