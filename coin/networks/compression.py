"""How a network is compressed: the options of `coin.compress`, of replicas and of merge methods."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from coin.core.choices import check_integer
from coin.errors import ConfigurationError

_BASES = {32: "", 8: "-int8base", 0: "-nobase"}


@dataclass(frozen=True)
class Compression:
    """How a network is compressed.

    Args:
        bits: 1 … 8 bits a value.
        base_bits: How the base is kept: 32: as it is; 8: in 8 bits a value, from which the delta is then taken; 0: not
            at all, so that this is plain quantisation of the network.

    Raises ConfigurationError where an option is out of its range.
    """

    bits: int
    base_bits: int = 32

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 1)
        if self.bits > 8:
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
        """Its name in results and files: ``3bit``, ``3bit-int8base``."""
        return f"{self.bits}bit{_BASES[self.base_bits]}"
