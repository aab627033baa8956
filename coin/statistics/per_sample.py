"""The general route: squared per-sample gradients of any parameter, by autograd alone, one sample at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def add_per_sample_squares(
    network: nn.Module, inputs: Tensor, cotangents: Tensor, parameters: Mapping[str, Tensor], totals: dict[str, Tensor]
) -> None:
    """Add Σ_n Σ_v (Uᵥₙ · ∂f(x_n)/∂θ)² to `totals` for the given parameters.

    Exact whatever the network does with a parameter: it rests on nothing but the gradient of one sample's output.

    Args:
        network: In eval mode, gradients enabled.
        inputs: Samples [B, …].
        cotangents: U [V, B, C].
        parameters: Those to differentiate by.
        totals: Accumulators of the parameters' shapes, written in place.
    """
    names, tensors = list(parameters), list(parameters.values())
    for n in range(len(inputs)):
        logits = network(inputs[n : n + 1])
        if not logits.requires_grad:
            continue
        for v in range(len(cotangents)):
            rows = torch.autograd.grad(
                logits, tensors, cotangents[v, n : n + 1], retain_graph=v + 1 < len(cotangents), allow_unused=True
            )
            for name, row in zip(names, rows, strict=True):
                if row is not None:
                    row = row.to(totals[name].dtype)
                    totals[name].addcmul_(row, row)
