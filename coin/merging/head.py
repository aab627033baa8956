"""The head of a coded network, fitted to the coding objective."""

from collections.abc import Sequence

import torch
from torch import nn

from coin.coding import fit_ridge
from coin.merging.experts import Experts
from coin.merging.rounding import Rounding
from coin.networks.heads import head_weight, linear_head
from coin.networks.running import check_head


def fit_head(
    network: nn.Module, experts: Experts, row: Sequence[float], rounding: Rounding | None = None
) -> None:
    """Fit a coded network's head (W, b) in place, so that it reads Σ_i β_i f_i out of the network's features φ(x).

    It becomes (W + ΔW, b + Δb), where ΔW φ + Δb is the ridge regression of Σβ_if_i − (Wφ + b) on the pooled calibration
    samples, its ridge chosen by leave-one-out (`fit_ridge`). So experts that
    agree keep their head. With a `rounding` W + ΔW is rounded. Raises HeadError where the head is not a fully connected
    layer, or the logits are not the head of its inputs.
    """
    head = linear_head(network)
    target = experts.mixture(row, 0, 1).double()
    run = experts.run(network, experts.pooled, features=True)
    check_head(network, run.features, run.logits)
    features = run.features.double()
    fit = fit_ridge(features, target - run.logits.double(), intercept=head.bias is not None)
    step = fit.coefficients.T  # ΔW [C, K]
    weight = head_weight(network)
    with torch.no_grad():
        if rounding is not None and rounding.takes(weight):
            centred = features - fit.input_mean
            gram = centred.T @ centred
            metric = gram + fit.ridges * torch.eye(len(gram)).to(step)
            step = rounding.step(weight, head.weight, step[None], metric[None])[0]
            head.weight.copy_(rounding.weight(weight))
        else:
            head.weight.add_(step.to(head.weight))
        if head.bias is not None:
            constant = fit.target_mean - step @ fit.input_mean
            head.bias.add_(constant.to(head.bias))
