"""How a network is compressed: the options of `coin.compress`, of replicas and of merge methods."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from coin.core.choices import check_integer, parse_enum
from coin.errors import ConfigurationError

_BASES = {32: "", 8: "-int8base", 0: "-nobase"}


class RoundingKind(StrEnum):
    """Whether `Refit` rounds while it fits, each layer making up for errors before it, or to the ``nearest`` after."""

    refit = "refit"
    nearest = "nearest"


@dataclass(frozen=True)
class Compression:
    """How a network is compressed.

    Args:
        bits: 1 … 8 bits a value.
        base_bits: How the base is kept: 32: as it is; 8: in 8 bits a value, from which the delta is then taken; 0: not
            at all, so that this is plain quantisation of the network.
        rounding: ``refit`` or ``nearest``, for a merge method that can round while it fits; by default its own.

    Raises ConfigurationError where an option is out of its range.
    """

    bits: int
    base_bits: int = 32
    rounding: RoundingKind | None = None

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 1)
        if self.bits > 8:
            raise ConfigurationError(f"found bits={self.bits}, expected a whole number from 1 to 8")
        if self.rounding is not None:
            object.__setattr__(self, "rounding", parse_enum(RoundingKind, "rounding", self.rounding))
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
        """Its name in results and files: ``3bit``, ``3bit-int8base``."""
        how = "-nearest" if self.rounding is RoundingKind.nearest else ""
        return f"{self.bits}bit{_BASES[self.base_bits]}{how}"
