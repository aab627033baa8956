"""Coded serving: the decoding front end, its engines, and the simulation of its tail latency.

Import from the modules: those of the policies and the simulation need no PyTorch, and the simulation's worker
processes start without it.
"""
