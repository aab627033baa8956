"""`coin.networks.rounding`, by the name that the other modules of this package know."""

from coin.networks.rounding import Rounding

__all__ = ["Rounding"]
