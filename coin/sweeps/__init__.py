"""Sweeps: an experiment over a grid or random draws of its options, in parallel processes, resumable."""

from coin.sweeps.sweep import SweepOutcome, sweep

__all__ = ["SweepOutcome", "sweep"]
