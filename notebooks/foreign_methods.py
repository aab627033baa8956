"""Two methods that are no part of coin, as their authors might write them: plain PyTorch, and nothing of coin's.

`coin.Foreign` says how such functions are called; ``configs/experiment/study/foreign.yaml`` runs both.
"""

from copy import deepcopy

import torch


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
