"""Methods that are no part of coin, as their authors might write them, in plain PyTorch.

Some are functions of networks, with nothing of coin's, others subclasses of `coin.MergeMethod`;
`notebooks/docs/method.md` says how both are called, and ``configs/experiment/study/foreign.yaml`` runs them.
"""

from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import coin
from coin.networks import head_name


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


def average(states, row):
    """Return the average of the experts' parameters with the weights of the row."""
    return {
        name: sum(weight * state[name] for weight, state in zip(row, states, strict=True))
        for name in states[0]
    }


def matrices(network):
    """Return the names of the weights of fully connected layers, of attention and of ungrouped convolutions."""
    found = []
    for place, layer in network.named_modules():
        is_grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
        if is_grouped or not isinstance(layer, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
            continue
        for name, _ in layer.named_parameters(prefix=place, recurse=False):
            if name.endswith("weight"):
                found.append(name)
    return found


class TaskArithmetic(coin.MergeMethod):
    """θ_0 + scale · N Σ_i β_i (θ_i − θ_0), with θ_0 the shared initialisation: the average where scale is 1/N.

    Source: Ilharco et al., *Editing models with task arithmetic* (ICLR 2023), section 2; 0.4 is its successors' scale
    where nothing is held out (Yadav et al., NeurIPS 2023, section 5).
    """

    name = "task_arithmetic"
    reads_initial = True

    def __init__(self, scale: float = 0.4, **options):
        super().__init__(**options)
        self.scale = scale

    def parameters(self, experts, row):
        """Return the one sum."""
        initial, _ = experts.initial()
        means = average(experts.parameters, row)
        steps = {name: len(row) * (means[name] - start) for name, start in initial.items()}
        return {name: start + self.scale * steps[name] for name, start in initial.items()}


class Ties(coin.MergeMethod):
    """Trim, elect sign, disjoint merge of the task vectors τ_i = θ_i − θ_0.

    1. Trim: of each τ_i only the `keep` share of entries with the largest magnitude stays, over all parameters.
    2. Elect: an entry's sign is that of Σ_i β_i τ_i.
    3. Merge: θ_0 + scale · Σ_{i∈A} β_i τ_i / Σ_{i∈A} β_i, A the experts whose trimmed entry has the elected sign.

    Source: Yadav et al., *TIES-merging* (NeurIPS 2023), algorithm 1, and its values where nothing is held out.
    """

    name = "ties"
    reads_initial = True

    def __init__(self, keep: float = 0.2, scale: float = 1.0, **options):
        super().__init__(**options)
        self.keep = keep
        self.scale = scale

    def parameters(self, experts, row):
        """Return the one merge."""
        initial, _ = experts.initial()
        trimmed = [self.trimmed(state, initial) for state in experts.parameters]
        merged = {}
        for name, start in initial.items():
            steps = torch.stack([each[name] for each in trimmed])  # [N, …]
            shares = steps.new_tensor(row).reshape(-1, *[1] * start.ndim)
            elected = (shares * steps).sum(0).sign()
            agreeing = shares * ((steps.sign() == elected) & (elected != 0))
            step = (agreeing * steps).sum(0) / agreeing.sum(0).clamp(min=1e-12)
            merged[name] = start + self.scale * step
        return merged

    def trimmed(self, state, initial):
        """Return an expert's task vector without its smaller entries."""
        steps = {name: state[name] - start for name, start in initial.items()}
        sizes = torch.cat([step.abs().flatten() for step in steps.values()])
        kept = max(1, round(self.keep * len(sizes)))
        smallest, _ = sizes.kthvalue(len(sizes) - kept + 1)
        return {name: step.masked_fill(step.abs() < smallest, 0) for name, step in steps.items()}


class ByMatrix(coin.MergeMethod):
    """Merges matrix after matrix, θ_0 + scale · merge(task vectors); averages the rest, and the head."""

    reads_initial = True

    def __init__(self, scale: float = 1.0, **options):
        super().__init__(**options)
        self.scale = scale

    def parameters(self, experts, row):
        """Return the one merge."""
        initial, _ = experts.initial()
        states = experts.parameters
        network = experts.empty_model()
        head = head_name(network)
        merged = average(states, row)
        for name in matrices(network):
            if not name.startswith(head):
                start = initial[name]
                steps = [(state[name] - start).flatten(1) for state in states]
                step = self.merge(steps, row)
                merged[name] = start + self.scale * step.reshape(start.shape)
        return merged

    def merge(self, steps, row):
        """Return the merged task vector of a matrix [O, K], of the experts' own."""
        raise NotImplementedError


def weighed(steps, row):
    """Return N β_i times the task vectors, of which the literature's sums are."""
    return [len(row) * share * step for share, step in zip(row, steps, strict=True)]


class Wudi(ByMatrix):
    """The minimiser of Σ_i β_i ‖(W − W_i) τ_iᵀ‖² / ‖τ_i‖² for task vectors τ_i = W_i − W_0: RegMean without data.

    The rows of τ_i span the inputs that its fine-tuning has seen, so that τ_iᵀτ_i / ‖τ_i‖² stands for the Gram matrix
    of expert i's inputs. It is drawn to the average by `damping`, relative to the mean diagonal entry; transformers
    that were tuned far want more, such as 0.1. A matrix that an expert has left as it was is averaged.

    Source: Cheng et al., *Whoever started the interference should end it* (ICML 2025), there by gradient descent.
    """

    name = "wudi"

    def __init__(self, damping: float = 1e-4, **options):
        super().__init__(**options)
        self.damping = damping

    def merge(self, steps, row):
        """Return the minimiser."""
        mean = sum(weighed(steps, row)) / len(row)
        if not all(step.any() for step in steps):
            return mean
        doubled = [step.double() for step in steps]
        grams = [
            share * step.T @ step / step.square().sum()
            for share, step in zip(row, doubled, strict=True)
        ]
        pull = sum(step @ gram for step, gram in zip(doubled, grams, strict=True))
        total = sum(grams)
        ridge = self.damping * total.diagonal().mean()
        eye = torch.eye(len(total)).to(total)
        found = torch.linalg.solve(total + ridge * eye, pull + ridge * mean, left=False)
        return found.to(mean.dtype)


class IsoC(ByMatrix):
    """Gives the sum of the task vectors, USVᵀ, one singular value: mean(S) · UVᵀ.

    Source: Marczak et al., *No task left behind: isotropic model merging with common and task-specific subspaces*
    (ICML 2025, arXiv 2502.04959), Iso-C, whose scale is chosen on validation data near 1.
    """

    name = "iso_c"

    def merge(self, steps, row):
        """Return mean(S) · UVᵀ."""
        u, s, v = torch.linalg.svd(sum(weighed(steps, row)), full_matrices=False)
        return s.mean() * u @ v


class TsvM(ByMatrix):
    """Puts the top r/N singular vectors of every task vector side by side, U and V replaced by their polar factors.

    Source: Gargiulo et al., *Task singular vectors: reducing task interference in model merging* (CVPR 2025,
    arXiv 2412.00081), TSV-Merge, algorithm 1.
    """

    name = "tsv_m"

    def merge(self, steps, row):
        """Return U S V of all."""
        kept = max(1, min(steps[0].shape) // len(steps))
        left, sizes, right = [], [], []
        for step in weighed(steps, row):
            u, s, v = torch.linalg.svd(step, full_matrices=False)
            left.append(u.T[:kept])
            sizes.append(s[:kept])
            right.append(v[:kept])
        scaled = torch.cat(sizes)[:, None] * self.polar(torch.cat(right))
        return self.polar(torch.cat(left)).T @ scaled

    def polar(self, rows):
        """Return the nearest matrix of orthonormal rows."""
        p, _, q = torch.linalg.svd(rows, full_matrices=False)
        return p @ q


class Magic(ByMatrix):
    """Gives the sum of the task vectors, of each layer, the mean norm of the experts' own.

    Source: Li et al., *MAGIC: achieving superior model merging via magnitude calibration* (arXiv 2512.19320), the
    calibration in weight space, for task arithmetic; without its list of sensitive layers, which needs labels.
    """

    name = "magic"

    def merge(self, steps, row):
        """Return the sum, rescaled."""
        steps = weighed(steps, row)
        whole = sum(steps)
        norm = sum(step.norm() for step in steps) / len(steps)
        return whole * norm / whole.norm().clamp(min=1e-12)


class Ace(ByMatrix):
    """Averages task vectors Δ_i by the covariances of their inputs, as their centred rows show them: Σ_i = Δ_iᵀΔ_i.

    That is Σ_i Δ_i (Σ_i + εI) · (Σ_i (Σ_i + εI) + 1cᵀ)⁻¹, c being the columns' mean of Σ_i Σ_i. Where the norms of Δ_i
    are unequal, Σ_i is over its trace, and the first 0.3 singular vectors of the solution and what is left of it are
    added, with their mean singular value.

    Source: Xu et al., *ACE-Merging: data-free model merging with adaptive covariance estimation* (CVPR 2026, arXiv
    2603.02945), which averages weights in its text and task vectors in its code, as here.
    """

    name = "ace"
    ridge = 1e-5  # ε
    unequal = 0.3  # the variance of the log norms, relative to their squared mean
    share = 0.3  # of the singular vectors

    def merge(self, steps, row):
        """Return the average."""
        dtype = steps[0].dtype
        steps = [step.double() for step in weighed(steps, row)]
        logs = torch.stack([step.square().sum().clamp(min=1e-12).log() for step in steps])
        centred = [step - step.mean(0) for step in steps]
        grams = [each.T @ each for each in centred]
        traces = [each.square().sum().clamp(min=1e-12) for each in centred]
        is_unequal = len(steps) > 1 and bool(logs.var() > self.unequal * logs.mean() ** 2)
        if is_unequal:
            grams = [gram / trace for gram, trace in zip(grams, traces, strict=True)]
        eye = torch.eye(len(grams[0])).to(grams[0])
        damped = [
            gram + self.ridge / (trace if is_unequal else 1) * eye
            for gram, trace in zip(grams, traces, strict=True)
        ]
        weighted = sum(step @ gram for step, gram in zip(steps, damped, strict=True))
        found = torch.linalg.solve(sum(damped) + sum(grams).mean(0), weighted, left=False)
        if is_unequal:
            mean = sum(grams) / len(grams)
            left = sum(step @ (gram - mean) for step, gram in zip(steps, grams, strict=True))
            u, s, v = torch.linalg.svd(found + left, full_matrices=False)
            kept = max(1, int(self.share * len(s)))
            found = found + s[:kept].mean() * u[:, :kept] @ v[:kept]
        return found.to(dtype)


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
