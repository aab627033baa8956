"""Stand-ins of other papers that keep something for each expert, on finished experts: folders of seeds → CSV.

    python notebooks/rivals.py runs/NAME/seed-* --output rivals.csv

They are what a body with adapters has to beat, read as `expert_head` reads it: the lost expert's own head on the
features of a stand-in that knows whose answer it gives, whatever else is lost. A row for every seed, method and task:

- ``average+svd`` and ``base+svd``: the experts' average or the shared initialisation, and of each expert its vectors
  (biases, scales, BatchNorm statistics) and W_i − W to rank r, from a singular value decomposition, in 4 bits a value
  as adapters are; without data (Lu et al., *Twin-Merging*, NeurIPS 2024, arXiv 2406.15479).
- ``average+svd-mixed`` and ``base+svd-mixed``: the same with two directions in 8 bits and sixteen in 3 (Ping et al.,
  *Delta-CoMe: training-free delta-compression with mixed-precision*, NeurIPS 2024, arXiv 2406.08903).
- ``average+qera`` and ``base+qera``: as the first, but the SVD is that of (W_i − W) R^{1/2}, with R the mean outer
  product of the expert's own inputs of the layer on its calibration samples, so that the outputs' error is smallest
  where the inputs are the expert's (Zhang et al., *QERA: an analytical framework for quantization error
  reconstruction*, ICLR 2025, arXiv 2410.06040; ESM's expert, 2606.19164; EoRA, 2410.21271). `Refit`'s adapters are
  this, fitted in order on the body's own inputs, with the experts' outputs as targets, scales and shifts.
- ``emr``: the initialisation and one elected difference from it, of each expert a bit a weight and a scale (Huang et
  al., *EMR-Merging: tuning-free high-performance model merging*, NeurIPS 2024, arXiv 2405.17461).
- ``tall``: the initialisation and the sum of all differences from it, of each expert a bit a weight: whether its own
  difference is at least `TALL` times what the others' sum to (Wang et al., *Localizing task information for improved
  model merging and compression*, ICML 2024, arXiv 2405.07813, TALL-masks).
- ``ultradelta-0.01`` and ``-0.02``: the initialisation and of each expert's difference from it so few weights, in 4
  bits, that they take this share of a network: drawn alike from weights of equal value, more of them in layers of large
  variance (Wang et al., *Breaking the compression ceiling: data-free pipeline for ultra-efficient delta compression*,
  NeurIPS 2025, arXiv 2505.13563, as its text describes it; its factor by the trace norm is chosen here from `FACTORS`
  by the agreement with the expert on its calibration samples, which the paper does not have). Positions are counted at
  their entropy.
- ``feat_cal``, ``magic``, ``ace``: one network for all experts, as `coin.Refit` without adapters is, of
  ``foreign_methods.py``: *FeatCal* (arXiv 2605.13030), *MAGIC* (2512.19320) and *ACE-Merging* (2603.02945).

All but these three have the experts' own BatchNorm statistics. Columns that end in ``_4bit`` are with the body, and the
difference of ``emr`` and ``tall``, in 4 bits a value, 8 in short rows as `Refit` has them, and with all that experts
keep taken from the rounded body; those that end in ``_8bit`` likewise. ``memory_mib`` is the body, what all experts
keep beside it (of what equals the body's, nothing) and their heads, to the byte; ``networks`` that over an expert's.
"""

import argparse
import math
from copy import deepcopy
from pathlib import Path

import pandas as pd
import torch
from foreign_methods import Ace, Magic, feat_cal
from silent_faults import tasks_of

import coin
from coin.data import Calibration
from coin.files.yaml import read_yaml
from coin.merging.rounding import Rounding
from coin.networks import head_name, load_network, run_network
from coin.networks.delta import matrix_shape, quantise

RANKS, TALL = (4, 16), 0.6
MIXED = ((2, 8), (16, 3))  # how many directions, the largest first, have so many bits
DENSITIES = {"0.01": 0.03, "0.02": 0.07}  # shares of a network that are kept → of weights
FACTORS = (0.2, 0.4, 0.6, 0.8, 1.0)
DAMPING = 0.01  # of R, relative to its mean diagonal entry


def body_of(network):
    """Return the tensors of a network but for its head's."""
    head = f"{head_name(network)}."
    return {
        name: tensor for name, tensor in network.state_dict().items() if not name.startswith(head)
    }


def filled(network, state):
    """Return the network with these tensors, but with its own counters and indices."""
    network = deepcopy(network)
    for name, tensor in network.state_dict().items():
        if name in state and tensor.is_floating_point():
            tensor.copy_(state[name])
    return network


def finished(folder):
    """Return the experts of a seed's folder by task, their tasks, and the shared initialisation."""
    names = list(read_yaml(folder / "config.yaml")["tasks"])
    files = [load_network(folder / "experts" / name / "expert.safetensors") for name in names]
    tasks = tasks_of(folder, names, files[0].config.image_size)
    initial = f"initial-{max(file.num_classes for file in files)}.safetensors"
    base = load_network(folder.parent / "base" / initial).network
    return {name: file.network for name, file in zip(names, files, strict=True)}, tasks, base


def classes_of(network, task):
    """Return the classes that a network answers on a task's test set."""
    images, _ = task.splits.test[:]
    batches = Calibration.of([images], task.image_size)
    logits = [run_network(network, batch, features=False).logits for batch in batches]
    return torch.cat(logits).argmax(1)


def place_of(folder):
    """Return the columns that say where a seed's folder is from."""
    return {"experiment": folder.parent.name, "seed": int(folder.name.removeprefix("seed-"))}


def written(measure, description, output):
    """Measure the folders that the command line names, write the CSV, and return its rows."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="folders of seeds")
    parser.add_argument("--output", type=Path, default=Path(output), help="the CSV to write")
    given = parser.parse_args()
    found = pd.DataFrame([row for folder in given.folders for row in measure(folder)])
    found.to_csv(given.output, index=False)
    return found


def average_of(experts):
    """Return the mean of the experts' tensors but for their heads'."""
    every = [body_of(expert) for expert in experts]
    return {name: sum(own[name] for own in every) / len(every) for name in every[0]}


def matrices_of(expert):
    """Return the names of an expert's matrices and kernels but for its head's."""
    own = body_of(expert)
    parameters = dict(expert.named_parameters())
    return [name for name in own if name in parameters and own[name].ndim > 1]


def flat(state, names):
    """Return tensors as one vector."""
    return torch.cat([state[name].flatten() for name in names])


def shaped(vector, state, names):
    """Return a vector as tensors of these names and the shapes that they have in the state."""
    parts = vector.split([state[name].numel() for name in names])
    return {name: part.reshape(state[name].shape) for name, part in zip(names, parts, strict=True)}


def nbytes(tensors):
    """Return the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def in_bits(bits, network, base=None):
    """Return a body in so many bits a value, or what is left of it beside a base, and its bytes."""
    base_bits = 0 if base is None else 32
    rounding = Rounding(network, bits)
    for name in filter(rounding.takes, dict(network.named_parameters())):
        own = network.get_parameter(name).detach().double()
        rounding.round(name, own if base is None else own - base.get_parameter(name).double())
    packed = coin.compress(network, base, bits=bits, base_bits=base_bits, rounded=rounding.rounded)
    return body_of(packed.network()), packed.nbytes


def with_own(expert, body, names):
    """Return the expert with a body's tensors, but with its own of these names, and the bytes that they take."""
    plain = filled(expert, body)
    own = coin.compress(
        filled(plain, {name: expert.state_dict()[name] for name in names}), plain, bits=8
    )
    return own.network(), own.nbytes


def roots_of(expert, calibration):
    """Return R^{1/2} and its inverse [K, K] of every linear map without groups, from the expert's own inputs."""
    found = {}
    for name, gram in coin.gram_sums(expert, calibration).mean().items():
        _, columns = matrix_shape(expert.get_parameter(name).shape)
        if len(gram) > 1:
            continue
        matrix = gram[0, :columns, :columns].double()  # without the bias's entry
        values, vectors = torch.linalg.eigh(matrix)
        damping = DAMPING * matrix.diagonal().mean() + 1e-30
        roots = (values.clamp(min=0) + damping).sqrt()
        found[name] = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    return found


def split(step, roots, rank):
    """Return the largest singular directions of a difference [O, K], or of it times a root: factors [r, O], [r, K]."""
    weighted = step if roots is None else (step.double() @ roots[0]).to(step)
    u, s, v = torch.linalg.svd(weighted, False)
    root = s[:rank, None].sqrt()
    right = root * v[:rank]
    if roots is not None:
        right = (right.double() @ roots[1]).to(step)
    return root * u.T[:rank].contiguous(), right


def by_low_rank(experts, body, directions, weights=None):
    """Return the experts with their differences from a body to some rank, and the bytes that are kept beside it.

    Args:
        experts: The experts.
        body: The body's tensors.
        directions: How many directions, the largest first, have so many bits.
        weights: Every expert's `roots_of`, where its inputs weigh the differences.
    """
    networks, total = [], 0
    for place, expert in enumerate(experts):
        own = body_of(expert)
        matrices = matrices_of(expert)
        roots = {} if weights is None else weights[place]
        network, size = with_own(expert, body, own.keys() - set(matrices))
        total += size
        state = {}
        for name in matrices:
            step = (own[name] - body[name]).reshape(matrix_shape(own[name].shape))
            left, right = split(step, roots.get(name), sum(count for count, _ in directions))
            kept, low_rank, first = [], torch.zeros_like(step), 0
            for count, bits in directions:
                last = first + count
                if first >= len(left):  # of a matrix with fewer directions
                    break
                pair = [quantise(factor[first:last].contiguous(), bits) for factor in (left, right)]
                low_rank += pair[0].dense().T @ pair[1].dense()
                kept += pair
                first = last
            size = sum(bytes_of(each.levels.shape, each.bits, each.scale) for each in kept)
            whole_size = bytes_of(step.shape, 4, kept[0].scale)
            if size >= whole_size:  # then the difference itself is smaller, in 4 bits
                low_rank, size = quantise(step, 4).dense(), whole_size
            state[name] = body[name] + low_rank.reshape(body[name].shape)
            total += size
        networks.append(filled(network, state))
    return networks, total


def bytes_of(shape, bits, scale):
    """Return the bytes of a rounded matrix, its rows padded to bytes, each with a scale of the type of these."""
    rows, columns = shape
    return rows * (math.ceil(bits * columns / 8) + scale.element_size())


def low_rank_ways(name, weights):
    """Yield (method, r, directions, weights or none) of what is made of every expert's difference from a body."""
    for rank in RANKS:
        yield f"{name}+svd", rank, ((rank, 4),), None
    yield f"{name}+svd-mixed", sum(count for count, _ in MIXED), MIXED, None
    for rank in RANKS:
        yield f"{name}+qera", rank, ((rank, 4),), weights


def sparse(step, density):
    """Return a difference in 4 bits of which so many weights are left, drawn alike from those of equal value."""
    scale = step.abs().max().clamp(min=1e-38) / 7
    codes = (step / scale).round()
    kept = torch.zeros_like(step, dtype=torch.bool)
    for level in codes.unique():
        places = (codes == level).flatten().nonzero().flatten()
        chosen = torch.randperm(len(places))[: round(density * len(places))]
        kept.view(-1)[places[chosen]] = True
    return codes * scale * kept / density


def by_sparse(experts, base, body, density, calibration):
    """Return the experts with sparse differences from the initialisation, and the bytes that are kept beside it."""
    networks, total = [], 0
    for expert, batches in zip(experts, calibration, strict=True):
        own = body_of(expert)
        matrices = matrices_of(expert)
        network, size = with_own(expert, body, own.keys() - set(matrices))
        total += size
        steps = {name: own[name] - base[name] for name in matrices}
        by_variance = sorted(matrices, key=lambda name, steps=steps: float(steps[name].var()))
        torch.manual_seed(0)
        left = {}
        for place, name in enumerate(by_variance):
            group = 3 * place // len(by_variance)  # low, middle, high
            share = density * (0.5, 1.0, 1.5)[group]
            left[name] = sparse(steps[name], share)
            entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
            total += math.ceil(steps[name].numel() * (entropy + 4 * share) / 8)
        candidates = []
        for factor in FACTORS:
            state = {name: body[name] + factor * left[name] for name in matrices}
            candidates.append(filled(network, state))
        networks.append(max(candidates, key=lambda each, e=expert, b=batches: agrees(each, e, b)))
    return networks, total


def agrees(network, expert, batches):
    """Return on how many samples a network answers as an expert."""
    return sum(int((network(x).argmax(1) == expert(x).argmax(1)).sum()) for x in batches)


def by_masks(experts, base, bits, threshold):
    """Return the networks of TALL-masks, or of EMR-Merging without a threshold, and the bytes beside the base."""
    every = [body_of(expert) for expert in experts]
    names = [name for name, _ in experts[0].named_parameters() if name in base]
    start = flat(base, names)
    steps = torch.stack([flat(own, names) for own in every]) - start
    shared = steps.sum(0)
    if threshold is None:  # the largest of those that have the sum's sign
        shared = shared.sign() * (steps * shared.sign()).clamp(min=0).amax(0)
    plain = filled(experts[0], base)
    state, size = in_bits(bits, filled(plain, shaped(start + shared, base, names)), plain)
    shared = flat(state, names) - start
    networks = []
    for expert, own, step in zip(experts, every, steps, strict=True):
        if threshold is None:
            mask = step * shared > 0
            scale = step.abs().sum() / shared[mask].abs().sum().clamp(min=1e-38)
            size += 4
        else:
            mask, scale = step.abs() >= threshold * (shared - step).abs(), 1.0
        network, vectors = with_own(expert, base, own.keys() - set(names))
        networks.append(filled(network, shaped(start + scale * mask * shared, base, names)))
        size += math.ceil(len(mask) / 8) + vectors
    return networks, size


def stand_ins(experts, bodies, bits, calibration, weights, initial):
    """Yield (method, r, the networks, all bytes but the heads') of every method; `bodies` are tensors and bytes."""
    for name, (body, size) in bodies.items():
        if name not in ("average", "base"):  # one network for all
            yield name, None, [filled(expert, body) for expert in experts], size
            continue
        for method, rank, directions, roots in low_rank_ways(name, weights):
            networks, kept = by_low_rank(experts, body, directions, roots)
            yield method, rank, networks, size + kept
    base, size = bodies["base"]
    for name, density in DENSITIES.items():
        networks, kept = by_sparse(experts, initial, base, density, calibration)
        yield f"ultradelta-{name}", None, networks, size + kept
    for name, threshold in (("emr", None), ("tall", TALL)):
        networks, kept = by_masks(experts, base, bits, threshold)
        yield name, None, networks, size + kept


@torch.no_grad()
def measure(folder):
    """Yield a row for every method and task of a seed's folder."""
    found, tasks, base = finished(folder)
    names, experts = list(found), list(found.values())

    def share(equal):
        return float(equal.double().mean())

    labels = {name: tasks.tasks[name].splits.test.targets for name in names}
    wanted = {name: classes_of(expert, tasks.tasks[name]) for name, expert in found.items()}
    right = {name: share(wanted[name] == labels[name]) for name in names}
    samples = list(tasks.calibrations().values())
    weights = [roots_of(expert, own) for expert, own in zip(experts, samples, strict=True)]
    average = average_of(experts)
    heads = nbytes(
        tensor
        for each in experts
        for name, tensor in each.state_dict().items()
        if name not in average
    )
    whole_expert = nbytes(experts[0].state_dict().values())
    # No bytes.
    headless = filled(
        experts[0], {name: tensor * 0 for name, tensor in experts[0].state_dict().items()}
    )
    whole = {"average": filled(headless, average), "base": filled(headless, body_of(base))}
    given = {"calibration": samples, "initial": base}
    others = {
        "feat_cal": coin.UserMethod(feat_cal),
        "magic": Magic(batchnorm="average"),
        "ace": Ace(batchnorm="average"),
    }
    for name, method in others.items():
        merged = coin.merge_networks(method, experts, coin.uniform(len(experts)), **given)[0]
        whole[name] = filled(headless, body_of(merged))
    rows = {}
    for bits, end in ((8, "_8bit"), (4, "_4bit")):
        bodies = {name: in_bits(bits, network) for name, network in whole.items()}
        for method, rank, networks, kept in stand_ins(
            experts, bodies, bits, samples, weights, body_of(base)
        ):
            for name, network in zip(names, networks, strict=True):
                answers = classes_of(network, tasks.tasks[name])
                decoded = share(answers == labels[name])
                row = place_of(folder) | {
                    "method": method,
                    "rank": rank,
                    "task": name,
                    "expert_accuracy": right[name],
                }
                row = rows.setdefault((method, rank, name), row)
                row |= {f"decoded_accuracy{end}": decoded, f"nda{end}": decoded / right[name]}
                row |= {f"agreement{end}": share(answers == wanted[name])}
                row |= {
                    f"memory_mib{end}": (kept + heads) / 2**20,
                    f"networks{end}": (kept + heads) / whole_expert,
                }
    yield from rows.values()


if __name__ == "__main__":
    found = written(measure, __doc__, "rivals.csv")
    shown = {name: ["mean", "min"] if "nda" in name else "mean" for name in found.columns[6:]}
    print(
        found.groupby(["method", "rank"], dropna=False, sort=False).agg(shown).round(4).to_string()
    )
