"""Methods that are no part of coin, as their authors might write them: plain PyTorch, and nothing of coin's.

`coin.UserMethod` says how such functions are called; ``configs/experiment/study/foreign.yaml`` runs all.
"""

from copy import deepcopy

import torch
from torch import nn


def averaged(experts, row):
    """Return a network with the weighted average of the experts' parameters and BatchNorm statistics."""
    average, states = deepcopy(experts[0]), [expert.state_dict() for expert in experts]
    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(sum(weight * state[name] for weight, state in zip(row, states, strict=True)))
    return average


def dare(experts, calibration, row, initial, drop=0.5):
    """Drop a share of every task vector's entries at random, rescale the others by 1 / (1 - share), and average.

    Source: Yu et al., *Language models are super Mario: absorbing abilities from homologous models as a free lunch*
    (ICML 2024), DARE with average merging.
    """
    with torch.no_grad():
        for expert in experts:
            for parameter, start in zip(expert.parameters(), initial.parameters(), strict=True):
                kept = torch.rand_like(start) >= drop
                parameter.copy_(start + kept * (parameter - start) / (1 - drop))
    return averaged(experts, row)


def distil(experts, calibration, row, steps=150, lr=1e-3, batch_size=64):
    """Train the average of the experts for a few steps of Adam on their weighted answers to the calibration samples.

    Source: Lin et al., *Ensemble distillation for robust model fusion in federated learning* (NeurIPS 2020), without
    data of its own and with the code's weights.
    """
    batches = [batch for own in calibration for batch in own]
    with torch.no_grad():
        wanted = torch.cat([sum(weight * f(x) for weight, f in zip(row, experts, strict=True)) for x in batches])
    inputs = torch.cat(batches)
    student = averaged(experts, row)
    optimizer = torch.optim.Adam(student.parameters(), lr)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (batch_size,))
        loss = 0.5 * (student(inputs[chosen]) - wanted[chosen]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def by_matrix(tensors, row, initial, name, layer, merge, scale):
    """Return initial + scale · merge(N β_i times the task vectors), or the average of what is no matrix.

    Matrices are the weights of fully connected layers, of attention and of ungrouped convolutions.
    """
    grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
    if not isinstance(layer, nn.Linear | nn.Conv2d | nn.MultiheadAttention) or grouped or not name.endswith("weight"):
        return sum(weight * tensor for weight, tensor in zip(row, tensors, strict=True))
    steps = [(own - initial).flatten(1) * len(row) * share for own, share in zip(tensors, row, strict=True)]
    return initial + scale * merge(steps).reshape(initial.shape)


def iso_c(tensors, row, initial, name, layer, scale=1.0):
    """Give the sum of the task vectors, USVᵀ, one singular value: mean(S) · UVᵀ.

    Source: Marczak et al., *No task left behind: isotropic model merging with common and task-specific subspaces*
    (ICML 2025, arXiv 2502.04959), Iso-C, whose scale is chosen on validation data near 1.
    """

    def isotropic(steps):
        u, s, v = torch.linalg.svd(sum(steps), full_matrices=False)
        return s.mean() * u @ v

    return by_matrix(tensors, row, initial, name, layer, isotropic, scale)


def tsv_m(tensors, row, initial, name, layer, scale=1.0):
    """Put the top r/N singular vectors of every task vector side by side, U and V replaced by their polar factors.

    Source: Gargiulo et al., *Task singular vectors: reducing task interference in model merging* (CVPR 2025,
    arXiv 2412.00081), TSV-Merge, algorithm 1.
    """

    def side_by_side(steps):
        kept = max(1, min(steps[0].shape) // len(steps))
        parts = [torch.linalg.svd(step, full_matrices=False) for step in steps]
        u, s, v = (
            torch.cat(each) for each in zip(*((u.T[:kept], s[:kept], v[:kept]) for u, s, v in parts), strict=True)
        )
        return polar(u).T @ (s[:, None] * polar(v))

    def polar(rows):
        p, _, q = torch.linalg.svd(rows, full_matrices=False)
        return p @ q

    return by_matrix(tensors, row, initial, name, layer, side_by_side, scale)
