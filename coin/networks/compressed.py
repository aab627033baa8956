"""Compressed networks: the difference from a base that is stored anyway, in few bits."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coin.core.devices import device_of
from coin.errors import ConfigurationError, FileError, StateError
from coin.files.safetensors import StateFile, save_state
from coin.files.tensors import check_finite, check_layout, fingerprint
from coin.networks.adapter import Adapter, adapters_state, split_adapters
from coin.networks.batchnorm import folded
from coin.networks.calling import clone, plain
from coin.networks.delta import (
    Rounded,
    added,
    decode,
    encode,
    is_smaller_rounded,
    matrix_shape,
    quantise,
    round_columns,
    size,
)
from coin.networks.heads import head_name, replace_head
from coin.networks.kept import Kept, keep, not_makeable, tied_names, unpacked
from coin.networks.weights import check_plain, fill_network

SHORT = 128  # values of a row below which `Refit` rounds it to 8 bits whatever the bits of the others
PACKED = "packed"  # the one tensor of a compressed network's file
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
        if self.bits not in range(1, 9):
            raise ConfigurationError(f"found bits={self.bits}, expected a whole number from 1 to 8")
        if self.base_bits not in _BASES:
            raise ConfigurationError(f"found base_bits={self.base_bits!r}, expected 32, 8 or 0")

    @classmethod
    def of(cls, options: "Compression | Mapping[str, Any]") -> Self:
        """Return a section of options as an object."""
        try:
            return cls(**(asdict(options) if isinstance(options, Compression) else options))
        except TypeError as error:
            raise ConfigurationError(f"found {options!r:.100}, expected bits and base_bits") from error

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
        adapters: Of a body, what experts keep beside it.

    >>> coin.compress(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), bits=3)  # of 288 bytes
    Compressed(3 bits, 56 bytes, base of 32 bits)
    """

    base: nn.Module
    base_bits: int
    _data: Tensor
    _kinds: list[int]
    _folded: dict[str, str]  # the BatchNorms that are, into which weights
    _outputs: int | None  # of the head, where the base's has others
    _kept: "Compressed | None" = None  # the base's bytes
    adapters: Sequence[Adapter] = ()

    def __repr__(self) -> str:
        kinds = sorted({kind for kind in self._kinds if 0 < kind <= 8})  # the others are kept as they are
        how = ", ".join(f"{kind} bits" for kind in kinds)
        return f"Compressed({how or 'whole tensors'}, {self.nbytes} bytes, base of {self.base_bits} bits)"

    @property
    def nbytes(self) -> int:
        """The network's bytes and its adapters', without the base."""
        return self._data.numel() + sum(each.nbytes for each in self.adapters)

    @property
    def base_nbytes(self) -> int:
        """The bytes of the base as stored."""
        if self.base_bits == 8:
            return (self._kept or int8(self.base)).nbytes
        return self.base_bits and sum(tensor.nbytes for tensor in stored(self.base).values())

    def network(self) -> nn.Module:
        """Return the decompressed network, a new one in eval mode; a body is without its `adapters`."""
        if self._is_packable:
            return unpacked(self.packed())
        network = self._empty()
        reference = _reference(network, self.base if self.base_bits else None, self._folded)
        every = zip(reference.items(), self._kinds, self._parts(reference), strict=True)
        state = {name: decode(kind, data, tensor) for (name, tensor), kind, data in every}
        fill_network(network, {name: state[first] for name, first in _ties(network).items()}, "the compressed network")
        return network

    def packed(self) -> nn.Module:
        """Return the network as it is stored, a new one in eval mode: a matrix is unpacked when a layer reads it.

        Where it is a delta from a base, or has parameters that are `not_makeable`, that is `network`.
        """
        if not self._is_packable:
            return self.network()
        network = plain(clone(self.base, shared=True)).eval()
        own = stored(network)
        matrices: dict[str, Kept] = {}
        values: dict[str, Tensor] = {}
        for (name, tensor), kind, data in zip(own.items(), self._kinds, self._parts(own), strict=True):
            if 1 <= kind <= 8:
                matrices[name] = Kept.packed(network.get_parameter(name), data, kind)
            else:
                values[name] = decode(kind, data, torch.zeros_like(tensor))
        names = tied_names(network)
        for name, first in _ties(network).items():
            place, _, parameter = name.rpartition(".")
            layer = network.get_submodule(place)
            if first in matrices:
                if name == first:
                    keep(network, names[name], matrices[first])
            elif parameter in layer._parameters:
                value = values[first]
                setattr(layer, parameter, nn.Parameter(value, requires_grad=value.is_floating_point()))
            else:  # a buffer
                setattr(layer, parameter, values[first])
        return network

    @cached_property
    def _is_packable(self) -> bool:
        """Whether its matrices can be unpacked when a layer reads them."""
        return self.base_bits == 0 and not not_makeable(self.base)

    def _empty(self) -> nn.Module:
        """Return a network of its architecture and class count, with any weights."""
        network = plain(clone(self.base)).eval()
        if self._outputs is not None:
            with torch.random.fork_rng(devices=[]):
                replace_head(network, self._outputs)
        return network

    def _parts(self, like: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Return the bytes of every tensor; a StateError where they are not those of tensors like these."""
        sizes = [size(kind, tensor) for kind, tensor in zip(self._kinds, like.values(), strict=False)]
        if len(self._kinds) != len(like) or sum(sizes) != len(self._data):
            found = f"found {len(self._kinds)} compressed tensors of {len(self._data)} bytes"
            expected = f"{len(like)} of {sum(sizes)}; give a base of its architecture"
            raise StateError(f"{found} for a {type(self.base).__name__}, expected {expected}")
        return torch.split(self._data, sizes)

    def save(self, path: Path | str, provenance: Mapping[str, Any] | None = None) -> None:
        """Write the file. With ``base_bits=8`` the base is not in it; `load` rounds it again."""
        own = {"base_bits": self.base_bits, "kinds": self._kinds, "folded": self._folded, "outputs": self._outputs}
        mark = fingerprint(self.base.state_dict()) if self.base_bits else None
        state = {PACKED: self._data, **adapters_state(self.adapters)}
        told = {**own, "base": mark, "sum": fingerprint(state), "adapters": len(self.adapters)}
        save_state(Path(path), state, {**(provenance or {}), "compressed": told})

    @classmethod
    def load(cls, path: Path | str, base: nn.Module) -> "Compressed":
        """Load a compressed network, given its base: the original one for an int8 base, one like it for 0 bits."""
        file = StateFile(Path(path))
        try:
            told, data = file.provenance["compressed"], file[PACKED].clone()
            mark, base_bits, intact = told["base"], told["base_bits"], told["sum"] == fingerprint(file)
            made = cls(base, base_bits, data, list(told["kinds"]), dict(told["folded"]), told["outputs"])
            made.adapters = split_adapters(file, told["adapters"])[1]
        except (KeyError, TypeError) as error:
            raise FileError(f"'{path}' holds no compressed network, expected one that coin wrote") from error
        if not intact:
            raise FileError(f"'{path}' is damaged: its bytes are not those that were written; make it again")
        if base_bits == 8 and fingerprint(base.state_dict()) != mark:
            made.base = int8(base).network()
        if base_bits and (found := fingerprint(made.base.state_dict())) != mark:
            raise FileError(f"'{path}' is a delta from the base {mark:.12}, found {found:.12}; give its own base")
        return made


Base = nn.Module | Compressed | None
"""What a network is a delta from; for ``base_bits=8`` it may be rounded already."""


def compress(
    network: nn.Module, base: "Base | Reference", *, bits: int, base_bits: int = 32,
    rounded: Mapping[str, Rounded] | None = None,
) -> Compressed:  # fmt: skip
    """Compress a network to its delta from a base, such as the shared initialisation of an expert or a coded model.

    Kernels are flattened to a matrix with a row an output, and rounded to few bits a value with a scale a row
    (`coin.networks.delta.quantise`). Where the network has its BatchNorms folded into the maps before them, as `Refit`
    does, so has the base that the delta is from. The base's head may have fewer or more outputs: the rows beyond its
    own are zero.

    Args:
        network: The network.
        base: What it was fine-tuned or merged from, for ``base_bits=8`` possibly rounded already; not needed for 0.
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
    if base_bits and base is None:
        raise ConfigurationError(f"found no base and base_bits={base_bits}, expected a base; give it, or base_bits=0")
    check_plain(network)
    own = stored(network)
    check_finite(own, "the network to compress", [name for name, _ in network.named_buffers()])
    base, kept, norms, reference = base if isinstance(base, Reference) else reference_of(network, base, base_bits)
    buffers = dict(network.named_buffers())  # such as masks
    options = {name: (None,) if name in buffers else (bits, (rounded or {}).get(name)) for name in own}
    made = [encode(tensor, reference[name], *options[name]) for name, tensor in own.items()]
    outputs = next((len(own[name]) for name, tensor in stored(base).items() if tensor.shape != own[name].shape), None)
    data = torch.cat([torch.empty(0, dtype=torch.uint8), *(data for _, data in made)])
    return Compressed(base, base_bits, data, [kind for kind, _ in made], norms, outputs, kept)


class Reference(NamedTuple):
    """The tensors that a network's are a delta from, and where they come from."""

    base: nn.Module  # as it is kept; the network itself where there is none
    kept: Compressed | None  # the bytes that it is kept in, if these are not its own
    norms: dict[str, str]  # the BatchNorms that are folded, into which weights
    tensors: dict[str, Tensor]


def reference_of(network: nn.Module, base: Base, base_bits: int) -> Reference:
    """Return what the tensors of a network are a delta from, its BatchNorms folded where the network's are; on the CPU.

    There bytes are kept and read back, wherever the network is.
    """
    network = _on_cpu(network)
    base = _on_cpu(base) if isinstance(base, nn.Module) else base
    if base is None or not base_bits:
        return Reference(network, None, {}, _reference(network, None, {}))
    if not isinstance(base, Compressed):
        check_plain(base)
        check_finite(stored(base), "the base", [name for name, _ in base.named_buffers()])
    kept = base if isinstance(base, Compressed) else int8(base) if base_bits == 8 else None
    base = kept.network() if kept else cast(nn.Module, base)
    norms = _folds(network, _reference(network, base, {}))
    return Reference(base, kept, norms, _reference(network, base, norms))


def _on_cpu(network: nn.Module) -> nn.Module:
    """Return a network on the CPU, itself if it is there."""
    return network if device_of(network).type == "cpu" else clone(network).cpu()


def int8(base: nn.Module) -> Compressed:
    """Return a base as it is kept for ``base_bits=8``: a network of its own in 8 bits a value."""
    return compress(base, None, bits=8, base_bits=0)


def _ties(network: nn.Module) -> dict[str, str]:
    """Return the names of a network's tensors, each with the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in network.state_dict(keep_vars=True).items()}


def stored(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors, tied ones once, on the CPU."""
    state = network.state_dict()
    return {name: state[name].detach().cpu() for name, first in _ties(network).items() if name == first}


def _reference(network: nn.Module, base: nn.Module | None, folds: Mapping[str, str]) -> dict[str, Tensor]:
    """Return what a network's tensors are a delta from: the base's, these BatchNorms folded; zeros without a base."""
    own = stored(network)
    if base is None:
        return {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    state = stored(base)
    if any(name in state and state[name].shape != tensor.shape for name, tensor in own.items()):
        for name in (f"{head_name(network)}.weight", f"{head_name(network)}.bias"):
            if name in own and name in state and state[name].shape[1:] == own[name].shape[1:]:
                rows = state[name][: len(own[name])]
                state[name] = torch.cat([rows, rows.new_zeros(len(own[name]) - len(rows), *rows.shape[1:])])
    check_layout(own, state, "the base")
    for name, tensor in own.items():
        if tensor.dtype != (base_type := state[name].dtype):
            raise StateError(f"'{name}' is {tensor.dtype}, in the base {base_type}, expected one type; convert one")
    for norm, weight in folds.items():
        bias = f"{weight.removesuffix('weight')}bias"
        eps = cast(_BatchNorm, network.get_submodule(norm)).eps
        state |= folded(state, weight, bias if bias in state else None, norm, eps)
    return {name: state[name].to(tensor.dtype) for name, tensor in own.items()}


def _folds(network: nn.Module, base: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the BatchNorms that are folded, whose means are 0, each with the weight that it is folded into.

    The pairs are those that bring the weights nearest to the base's, so scaled: not every network can be traced.
    """
    own, scales = stored(network), dict[str, Tensor]()
    for name, norm in network.named_modules():
        gain, mean, variance = (f"{name}.{part}" for part in ("weight", "running_mean", "running_var"))
        if isinstance(norm, _BatchNorm) and {gain, mean} <= own.keys() and not own[mean].any():
            scales[name] = base[gain] / (base[variance].double() + norm.eps).sqrt()
    maps = [name for name, tensor in own.items() if tensor.ndim > 1 and tensor.is_floating_point()]
    nearer = np.zeros((len(scales), len(maps)))  # by how much is ‖W − sW₀‖² less than ‖W − W₀‖², over ‖W‖²
    for column, weight in enumerate(maps if scales else ()):
        now, before = (state[weight].flatten(1).double() for state in (own, base))
        products, squares, size = (now * before).sum(1), before.square().sum(1), now.square().sum() + 1e-38
        for row, s in enumerate(scales.values()):
            if len(s) == len(now):
                nearer[row, column] = ((s - 1) * (2 * products - (s + 1) * squares)).sum().clamp(min=0) / size
    pairs, norms = zip(*linear_sum_assignment(nearer, maximize=True), strict=True), list(scales)
    return {norms[row]: maps[column] for row, column in pairs if nearer[row, column] > 0}


class Rounding:
    """Rounds a network's matrices to few bits a value, as deltas from a reference; `rounded` holds those so far."""

    def __init__(self, reference: Reference, bits: int) -> None:
        self.reference, self._bits, self._tensors = reference, bits, reference.tensors
        self.rounded: dict[str, Rounded] = {}

    def bits(self, name: str) -> int:
        """Return the bits a value: 8 for short rows, of depthwise kernels for one, which are few and leave much."""
        return 8 if matrix_shape(self._tensors[name].shape)[1] < SHORT else self._bits

    def takes(self, name: str) -> bool:
        """Whether a tensor is a matrix that its rounded form is smaller than in float16."""
        tensor = self._tensors[name]
        return tensor.is_floating_point() and is_smaller_rounded(tensor.shape, self.bits(name))

    def weight(self, name: str) -> Tensor:
        """Return a rounded weight as it is read back."""
        return added(self._tensors[name], self.rounded[name].dense())

    def round(self, name: str, weight: Tensor) -> Tensor:
        """Round a weight to the nearest and return it."""
        base = self._tensors[name].to(weight.device).double()
        rounded = quantise((weight.double() - base).reshape(matrix_shape(base.shape)), self.bits(name))
        self.rounded[name] = rounded.cpu()
        return self.weight(name)

    def step(self, name: str, weight: Tensor, step: Tensor, metric: Tensor | None, turned: bool = False) -> Tensor:
        """Round weight + step, or with `turned` the weight's transpose, and return the step to what it became.

        The step ΔW [G, O, K] is the optimal one; one that is E beside it costs tr(E M Eᵀ), with M the metric [G, K, K].
        """
        base = self._tensors[name].to(weight.device).double()
        bits = self.bits(name)

        def grouped(x: Tensor) -> Tensor:
            return (x.T if turned else x).reshape(step.shape)

        def flat(x: Tensor) -> Tensor:
            x = x.flatten(0, 1)
            return (x.T if turned else x).reshape(matrix_shape(base.shape))

        now = grouped(weight.double() - base)
        wanted = now + step
        rounded = quantise(flat(wanted), bits)
        if metric is not None:
            scales = grouped(rounded.scale[:, None].expand(matrix_shape(base.shape)).reshape(base.shape))
            codes = round_columns(wanted, scales, bits, metric)
            rounded = Rounded(flat(codes), rounded.scale, bits)
        self.rounded[name] = rounded.cpu()
        return (grouped(rounded.dense().reshape(base.shape)) - now).to(step)
