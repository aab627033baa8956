"""Layer rules: squared per-sample gradients of a layer's parameters from its input and its output's cotangents."""
