"""Compressed networks: a network, or its difference from a base that is stored anyway, in few bits."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from coin.core.devices import device_of
from coin.errors import CoinWarning, ConfigurationError, FileError, StateError
from coin.files.safetensors import StateFile, save_state
from coin.files.tensors import check_finite, check_layout, fingerprint, nbytes
from coin.networks.adapter import Adapter, adapters_state, split_adapters
from coin.networks.batchnorm import folded_norms, mark_folded
from coin.networks.calling import clear_caches, clone
from coin.networks.delta import (
    Rounded,
    is_smaller_rounded,
    matrix_shape,
    quantise,
)
from coin.networks.heads import head_name, pad_head
from coin.networks.kept import keep, kept_parameters, not_makeable
from coin.networks.weights import stored

_WIDE = (torch.float32, torch.float64)  # types of which float16 keeps the deltas
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
    def of(cls, options: "Compression | Mapping[str, Any]", **fixed: int) -> Self:
        """Return a section of options as an object, with those that are `fixed`, which the section may not have."""
        if isinstance(options, cls):
            return replace(options, **fixed)
        try:
            return cls(**cast(Any, options), **fixed)
        except TypeError as error:
            names = "{bits: 4} or so" if fixed else "bits and base_bits"
            raise ConfigurationError(f"found {options!r:.100}, expected {names}") from error

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
        adapters = sum(adapter.nbytes for adapter in self.adapters)
        return matrices + nbytes(self.others.values()) + adapters

    def network(self) -> nn.Module:
        """Return the decompressed network, a new one in eval mode; a body is without its `adapters`."""
        return self._filled({})

    def packed(self) -> nn.Module:
        """Return the network as it is stored, a new one in eval mode: a matrix is unpacked when a layer reads it.

        Parameters that are `not_makeable` are whole; a warning names them. Raises ConfigurationError for a delta.
        """
        if self.base_bits:
            raise ConfigurationError(
                f"found a delta from a base of {self.base_bits} bits, expected base_bits=0; give its network()"
            )
        whole = [name for name in not_makeable(self.base) if name in self.rounded]
        if whole:
            warnings.warn(
                f"{type(self.base).__name__} is held packed but for {whole}, of containers or RNNs",
                CoinWarning,
                stacklevel=2,
            )
        packed = {name: matrix for name, matrix in self.rounded.items() if name not in whole}
        return self._filled(packed)

    @torch.no_grad()
    def _filled(self, packed: Mapping[str, Rounded]) -> nn.Module:
        """Return the network, with these matrices as they are stored."""
        network = clone(with_outputs(self.base, self.outputs)).eval()
        for name, tensor in stored(network).items():
            # In place: other attributes may hold it, too, as a list does.
            tensor.copy_(self._tensor(name, tensor))
            if name in packed:
                keep(network, name, packed[name])
        clear_caches(network)
        return network

    def _tensor(self, name: str, base: Tensor) -> Tensor:
        """Return a tensor of the network, given the base's."""
        if self.base_bits == 0:
            base = torch.zeros_like(base)
        if name in self.rounded:
            delta = self.rounded[name].dense()
        elif name not in self.others:
            return base
        elif base.dtype in _WIDE and self.others[name].dtype == torch.float16:
            delta = self.others[name]
        else:
            return self.others[name]
        return base + delta.to(base.dtype).view(base.shape)

    def save(self, path: Path | str, provenance: Mapping[str, Any] | None = None) -> None:
        """Write the file. With ``base_bits=8`` the base is not in it; `load` rounds it again."""
        state = {**self.others, **adapters_state(self.adapters)}
        for name, rounded in self.rounded.items():
            state[f"{name}.codes"] = rounded.packed()
            state[f"{name}.scale"] = rounded.scale
        described = {
            "base": fingerprint(self.base.state_dict()) if self.base_bits else None,
            "base_bits": self.base_bits,
            "base_nbytes": self.base_nbytes,
            "bits": {name: rounded.bits for name, rounded in self.rounded.items()},
            "shapes": shapes_of(with_outputs(self.base, self.outputs)),
            "outputs": self.outputs,
            "adapters": len(self.adapters),
            "folded": folded_norms(self.base),
        }
        every = {**(provenance or {}), "compressed": described}
        save_state(Path(path), state, every)

    @classmethod
    def load(cls, path: Path | str, base: nn.Module, hashed: str | None = None) -> Self:
        """Load a compressed network, given its base: the original one for an int8 base, one like it for 0 bits.

        `hashed` is the base's fingerprint, where it is known.
        """
        file = StateFile(Path(path))
        described = file.provenance.get("compressed")
        if described is None:
            raise FileError(f"'{path}' holds no compressed network, expected one that coin wrote")
        base_bits = described["base_bits"]
        if base_bits:
            expected = described["base"]
            found = hashed or fingerprint(base.state_dict())
            if base_bits == 8 and found != expected:
                base = int8(base).network()
                found = fingerprint(base.state_dict())
            if found != expected:
                raise FileError(
                    f"'{path}' is a delta from the base {expected:.12}, found {found:.12}; give its own base"
                )
        shapes = shapes_of(with_outputs(base, described["outputs"]))
        if shapes != described["shapes"]:
            raise StateError(
                f"the tensors of '{path}' are not those of a {type(base).__name__}; give a network of its architecture"
            )
        if described["folded"]:
            base = clone(base, shared=True)  # the caller's stays unmarked
            mark_folded(base, described["folded"])
        names, adapters = split_adapters(file, described["adapters"])
        others = {name: file[name].clone() for name in names}
        rounded = {}
        for name, bits in described["bits"].items():
            codes = others.pop(f"{name}.codes")
            scale = others.pop(f"{name}.scale")
            _, columns = matrix_shape(shapes[name])
            rounded[name] = Rounded.unpacked(codes, scale, bits, columns)
        return cls(
            base=base,
            base_bits=base_bits,
            base_nbytes=described["base_nbytes"],
            rounded=rounded,
            others=others,
            outputs=described["outputs"],
            adapters=adapters,
        )


@torch.no_grad()
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
    if any(kept_parameters(network)):
        raise StateError(
            f"the weights of {type(network).__name__} are packed already, expected a plain network; compress that"
        )
    network = _on_cpu(network)
    own = stored(network)
    buffers = dict(network.named_buffers())  # such as masks, which may be infinite
    check_finite(own, "the network to compress", buffers)
    base, base_nbytes = _base_as_stored(network, base, base_bits)
    outputs = None
    if shapes_of(base) != shapes_of(network):
        outputs = getattr(network.get_submodule(head_name(network)), "out_features", None)
    reference = stored(with_outputs(base, outputs))
    check_layout(own, reference, "the base")
    matrices = {}
    others = {}
    for name, parameter in own.items():
        tensor = parameter.detach()
        before = reference[name].detach()
        if tensor.dtype != before.dtype:
            raise StateError(
                f"'{name}' is {tensor.dtype}, in the base {before.dtype}, expected one type; convert one"
            )
        if base_bits == 0:
            before = torch.zeros_like(tensor)
        if torch.equal(tensor, before):
            continue
        is_rounded = tensor.is_floating_point() and is_smaller_rounded(tensor.shape, bits)
        if rounded is not None and name in rounded:
            matrices[name] = rounded[name]
        elif is_rounded and name not in buffers:
            delta = tensor.float() - before.float()
            matrix = delta.reshape(matrix_shape(tensor.shape))
            matrices[name] = quantise(matrix, bits)
        else:
            others[name] = _as_half(tensor, before, name in buffers)
    return Compressed(base, base_bits, base_nbytes, matrices, others, outputs)


def _as_half(tensor: Tensor, base: Tensor, is_buffer: bool) -> Tensor:
    """Return a tensor's delta in float16, or the tensor where it is of another type or that loses a thousandth.

    A thousandth is of the largest of a parameter's values, and of every single one of a buffer's.
    """
    if tensor.dtype not in _WIDE:
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


def _base_as_stored(
    network: nn.Module, base: nn.Module | None, base_bits: int
) -> tuple[nn.Module, int]:
    """Return the base, on the CPU, and its bytes as stored; where it is not, the network itself and 0."""
    if base_bits == 0:
        return network, 0
    if base is None:
        raise ConfigurationError(
            f"found no base and base_bits={base_bits}, expected a base; give it, or base_bits=0"
        )
    state = stored(base)
    check_finite(state, "the base", dict(base.named_buffers()))
    if base_bits == 8:
        rounded = int8(base)
        return rounded.network(), rounded.nbytes
    return _on_cpu(base), nbytes(state.values())


def int8(base: nn.Module) -> Compressed:
    """Return a base as it is kept for ``base_bits=8``: a network of its own in 8 bits a value."""
    return compress(base, None, bits=8, base_bits=0)


def shapes_of(network: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of what is `stored` of a network."""
    return {name: [*tensor.shape] for name, tensor in stored(network).items()}


def _on_cpu(network: nn.Module) -> nn.Module:
    """Return a network on the CPU, itself if it is there."""
    if device_of(network).type == "cpu":
        return network
    return clone(network).cpu()
