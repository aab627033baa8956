"""Methods that are no part of coin, as their authors might write them: plain PyTorch, and nothing of coin's.

`coin.UserMethod` says how such functions are called; ``configs/experiment/study/foreign.yaml`` runs all.
"""

from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def averaged(experts, row):
    """Return a network with the weighted average of the experts' parameters and BatchNorm statistics."""
    average, states = deepcopy(experts[0]), [expert.state_dict() for expert in experts]
    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(
                sum(weight * state[name] for weight, state in zip(row, states, strict=True))
            )
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
        wanted = torch.cat(
            [sum(weight * f(x) for weight, f in zip(row, experts, strict=True)) for x in batches]
        )
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
    if (
        not isinstance(layer, nn.Linear | nn.Conv2d | nn.MultiheadAttention)
        or grouped
        or not name.endswith("weight")
    ):
        return sum(weight * tensor for weight, tensor in zip(row, tensors, strict=True))
    steps = [
        (own - initial).flatten(1) * len(row) * share
        for own, share in zip(tensors, row, strict=True)
    ]
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
            torch.cat(each)
            for each in zip(*((u.T[:kept], s[:kept], v[:kept]) for u, s, v in parts), strict=True)
        )
        return polar(u).T @ (s[:, None] * polar(v))

    def polar(rows):
        p, _, q = torch.linalg.svd(rows, full_matrices=False)
        return p @ q

    return by_matrix(tensors, row, initial, name, layer, side_by_side, scale)


def magic(tensors, row, initial, name, layer, scale=1.0):
    """Give the sum of the task vectors, of each layer, the mean norm of the experts' own.

    Source: Li et al., *MAGIC: achieving superior model merging via magnitude calibration* (arXiv 2512.19320), the
    calibration in weight space, for task arithmetic; without its list of sensitive layers, which needs labels.
    """

    def calibrated(steps):
        whole = sum(steps)
        return (
            whole * sum(step.norm() for step in steps) / len(steps) / whole.norm().clamp(min=1e-12)
        )

    return by_matrix(tensors, row, initial, name, layer, calibrated, scale)


def ace(tensors, row, initial, name, layer, ridge=1e-5, unequal=0.3, share=0.3, scale=1.0):
    """Average task vectors Δ_i by the covariances of their inputs, as the centred rows of Δ_i show them: Σ_i = Δ_iᵀΔ_i.

    That is Σ_i Δ_i (Σ_i + εI) · (Σ_i (Σ_i + εI) + 1cᵀ)⁻¹, c being the columns' mean of Σ_i Σ_i. Where the norms of Δ_i
    are unequal, Σ_i is over its trace, and the first 0.3 singular vectors of the solution and what is left of it are
    added, with their mean singular value.

    Source: Xu et al., *ACE-Merging: data-free model merging with adaptive covariance estimation* (CVPR 2026, arXiv
    2603.02945), which averages weights in its text and task vectors in its code, as here.
    """

    def averaged_by_inputs(steps):
        steps = [step.double() for step in steps]
        logs = torch.stack([step.square().sum().clamp(min=1e-12).log() for step in steps])
        centred = [step - step.mean(0) for step in steps]
        grams, traces = (
            [each.T @ each for each in centred],
            [each.square().sum().clamp(min=1e-12) for each in centred],
        )
        is_unequal = len(steps) > 1 and bool(logs.var() > unequal * logs.mean() ** 2)
        if is_unequal:
            grams = [gram / trace for gram, trace in zip(grams, traces, strict=True)]
        eye = torch.eye(len(grams[0])).to(grams[0])
        damped = [
            gram + ridge / (trace if is_unequal else 1) * eye
            for gram, trace in zip(grams, traces, strict=True)
        ]
        weighted = sum(step @ gram for step, gram in zip(steps, damped, strict=True))
        found = torch.linalg.solve(sum(damped) + sum(grams).mean(0), weighted, left=False)
        if is_unequal:
            mean = sum(grams) / len(grams)
            left = sum(step @ (gram - mean) for step, gram in zip(steps, grams, strict=True))
            u, s, v = torch.linalg.svd(found + left, full_matrices=False)
            kept = max(1, int(share * len(s)))
            found = found + s[:kept].mean() * u[:, :kept] @ v[:kept]
        return found.to(tensors[0].dtype)

    return by_matrix(tensors, row, initial, name, layer, averaged_by_inputs, scale)


@torch.no_grad()
def feat_cal(experts, calibration, row, initial, scale=0.3, rho=2.2, own=0.25, ridge=0.05):
    """Merge by task arithmetic, then fit layer after layer, in the order of the forward pass, to the experts' answers.

    With a the layer's input in the network so far, a_i in expert i and t_i = 0.25 a_i + 0.75 a, W minimises the sum
    over tasks of E‖W a − W_i t_i‖² / ‖E a aᵀ‖, plus 0.05 ‖W − W̄‖², where W̄ is 2.2 times as far from the initialisation
    as task arithmetic's weight. The bias is fitted after it, and a LayerNorm's parameters to the experts' on the same
    inputs. The head is averaged. All inputs of the experts' layers are in memory at once.

    Source: *FeatCal: feature calibration for post-merging models* (arXiv 2605.13030), for fully connected layers and
    LayerNorms; here convolutions are fitted on their patches, and BatchNorm statistics averaged.
    """
    shares, merged = [len(row) * share for share in row], averaged(experts, row)
    *_, attentions = [in_linear_layers(network) for network in (*experts, initial, merged)]
    seen = list(map(layer_inputs, experts, calibration))
    *layers, head = seen[0]
    anchors, counts = {}, [len(each[head]) for each in seen]
    for name, parameter in merged.named_parameters():
        start = initial.get_parameter(name)
        step = scale * sum(
            w * (each.get_parameter(name) - start) for w, each in zip(shares, experts, strict=True)
        )
        anchors[name] = start + rho * step
        if not name.startswith(f"{head}."):
            parameter.copy_(start + step)

    def fit(layer, given, output, name):
        of = [expert.get_submodule(name) for expert in experts]
        anchor = {place: anchors[f"{name}.{place}"] for place, _ in layer.named_parameters()}
        mine, theirs = given[0].split(counts), [each.pop(name) for each in seen]
        if isinstance(layer, nn.LayerNorm):
            layer.weight[:], layer.bias[:] = fit_norm(layer, of, mine, anchor, shares, ridge)
        else:
            moments = [
                layer_moments(layer, *each, output, own) for each in zip(mine, theirs, strict=True)
            ]
            weight, bias = fit_matrix(layer, of, moments, anchor, shares, ridge)
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
        handles.pop(name).remove()
        return layer.forward(*given)

    handles = {
        name: merged.get_submodule(name).register_forward_hook(partial(fit, name=name))
        for name in layers
    }
    merged(torch.cat([batch for batches in calibration for batch in batches]))
    for name, attention in attentions.items():
        merged.set_submodule(name, attention)
    return merged


class Attention(nn.Module):
    """The self-attention of an `nn.MultiheadAttention`, as two linear layers with its parameters."""

    def __init__(self, attention):
        super().__init__()
        self.heads, self.inputs, self.outputs = (
            attention.num_heads,
            nn.Linear(1, 1),
            attention.out_proj,
        )
        self.inputs.weight, self.inputs.bias = attention.in_proj_weight, attention.in_proj_bias

    def forward(self, query, key, value, need_weights=False):
        """Return the output [n, T, D], and no weights."""
        q, k, v = self.inputs(query).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.outputs(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        ), None


def in_linear_layers(network):
    """Put `Attention` in the place of a network's attentions, as torchvision has them, and return these by name."""
    found = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.MultiheadAttention)
    }
    for name, attention in found.items():
        network.set_submodule(name, Attention(attention))
    return found


def layer_inputs(network, batches):
    """Return the inputs of the layers that `feat_cal` fits, in the order of the forward pass, the head last."""
    seen, handles = {}, []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm):

            def keep(_, given, name=name):
                seen.setdefault(name, []).append(given[0])

            handles.append(layer.register_forward_pre_hook(keep))
    for batch in batches:
        network(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items() if len(inputs) == len(batches)}


def layer_rows(layer, inputs, output):
    """Return what a layer multiplies by its weights [groups, rows, K]; of a convolution, the patches."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, inputs.shape[-1])
    padding = layer.padding
    # Perhaps padded before: as much as the output's size tells.
    if isinstance(padding, str) or not any(padding):
        sizes = zip(
            inputs.shape[2:],
            output.shape[2:],
            layer.kernel_size,
            layer.stride,
            layer.dilation,
            strict=True,
        )
        missing = [
            max(0, (out - 1) * stride + apart * (k - 1) + 1 - size)
            for size, out, k, stride, apart in sizes
        ]
        high, wide = ((each // 2, each - each // 2) for each in missing)
        inputs, padding = F.pad(inputs, (*wide, *high)), 0
    patches = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
    return patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def layer_moments(layer, inputs, theirs, output, own):
    """Return E a aᵀ, E a tᵀ, E a and E t of a layer on one task, with t = own · an expert's input + (1 − own) a."""
    sums, count = [0, 0, 0, 0], 0
    for a, t in zip(inputs.split(50), theirs.split(50), strict=True):
        a, t = layer_rows(layer, a, output), layer_rows(layer, t, output)
        t, count = own * t + (1 - own) * a, count + a.shape[1]
        sums = [
            s + new for s, new in zip(sums, (a.mT @ a, a.mT @ t, a.sum(1), t.sum(1)), strict=True)
        ]
    return [each / count for each in sums]


def fit_matrix(layer, of, moments, anchor, shares, ridge):
    """Return the weight and the bias of a layer in the experts `of`, by its moments on their tasks."""
    groups = len(moments[0][0])
    matrices = [each.weight.flatten(1).unflatten(0, (groups, -1)) for each in of]  # [G, O, K]
    norms = [gram.norm(dim=(1, 2)).clamp(min=1e-8) for gram, *_ in moments]
    scales = [(share / norm)[:, None, None] for share, norm in zip(shares, norms, strict=True)]
    left = sum(scale * gram for scale, (gram, *_) in zip(scales, moments, strict=True))
    left = left + ridge * torch.eye(left.shape[1]).to(left)
    terms = zip(scales, moments, matrices, strict=True)
    right = sum(scale * cross @ matrix.mT for scale, (_, cross, *_), matrix in terms)
    right = right + ridge * anchor["weight"].flatten(1).unflatten(0, (groups, -1)).mT
    found = torch.linalg.solve(left, right).mT
    if "bias" not in anchor:
        return found.reshape(layer.weight.shape), None
    bias, total = ridge * anchor["bias"].unflatten(0, (groups, -1)), ridge
    for scale, (_, _, a, t), matrix, each in zip(scales, moments, matrices, of, strict=True):
        shift = (matrix @ t[..., None] - found @ a[..., None])[..., 0]
        bias, total = (
            bias + scale[..., 0] * (each.bias.view_as(shift) + shift),
            total + scale[..., 0],
        )
    return found.reshape(layer.weight.shape), (bias / total).flatten()


def fit_norm(layer, of, inputs, anchor, shares, ridge):
    """Return the weight and the bias of a LayerNorm in the experts `of`, by its inputs on their tasks."""
    left = ridge * torch.eye(2).to(layer.weight)
    right = ridge * torch.stack([anchor["weight"], anchor["bias"]], -1)[..., None]  # [F, 2, 1]
    for share, a, own in zip(shares, inputs, of, strict=True):
        z = F.layer_norm(a, layer.normalized_shape, eps=layer.eps).flatten(0, -2).T  # [F, rows]
        pairs = torch.stack([z, torch.ones_like(z)], 1)
        gram = share * pairs @ pairs.mT / z.shape[1]
        left, right = left + gram, right + gram @ torch.stack([own.weight, own.bias], -1)[..., None]
    return torch.linalg.solve(left, right)[..., 0].T
