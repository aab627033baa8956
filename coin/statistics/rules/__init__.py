"""Layer rules: squared per-sample gradients of a layer's parameters from its input and its output's cotangents."""

from coin.statistics.rules.call import Call, Site
from coin.statistics.rules.recognise import reached_tensors, recognise

__all__ = ["Call", "Site", "reached_tensors", "recognise"]
