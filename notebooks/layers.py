"""How far stand-ins are from their experts, block by block, on finished experts: folders of seeds → CSV.

    python notebooks/layers.py runs/NAME/seed-* --output layers.csv

What `Refit`'s adapters add to a singular value decomposition weighted by the expert's own inputs (``average+qera`` of
`rivals.py`), with the same body, the experts' average in 4 bits, and the same rank, 16:

- ``weighted svd``: the body rounded to the nearest, and that decomposition of W_i − Q(W̄);
- ``in order``: the same body, and adapters that `coin.fit_adapters` fits in the order of execution, on the body's own
  inputs, to the expert's outputs;
- ``rounded by inputs``: the same, and the body rounded column by column, knowing of its inputs (`coin.Average` with
  adapters and `compress`).

``error`` is E‖h − h_i‖² / E‖h_i − E h_i‖² of the outputs h of a block on the test images of a task, h_i the expert's.
"""

import torch
from rivals import average_of, by_low_rank, filled, finished, in_bits, place_of, roots_of, written

import coin
from coin.data import Calibration
from coin.networks import head_name

RANK, BITS = 16, 4


def outputs_of_blocks(network, images, names):
    """Return the outputs of a network's blocks on images, by name."""
    found = {}

    def keep(name):
        def hook(_, __, output):
            found[name] = output

        return hook

    hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    network(images)
    for hook in hooks:
        hook.remove()
    return found


def errors(network, expert, batches, names):
    """Return by block the relative squared error of a network's outputs against the expert's."""
    wrong = dict.fromkeys(names, 0.0)
    squares = dict.fromkeys(names, 0.0)
    for images in batches:
        own = outputs_of_blocks(expert, images, names)
        other = outputs_of_blocks(network, images, names)
        for name in names:
            centre = own[name].mean(0, keepdim=True)
            wrong[name] += float((other[name] - own[name]).double().square().sum())
            squares[name] += float((own[name] - centre).double().square().sum())
    return {name: wrong[name] / squares[name] for name in names}


def stand_ins(experts, calibration):
    """Yield (method, a plain network for each expert)."""
    whole = filled(experts[0], average_of(experts))
    body, _ = in_bits(BITS, whole)
    weights = [roots_of(expert, own) for expert, own in zip(experts, calibration, strict=True)]
    yield "weighted svd", by_low_rank(experts, body, ((RANK, 4),), weights)[0]
    heads = [expert.get_submodule(head_name(expert)) for expert in experts]
    adapted = coin.fit_adapters(filled(whole, body), experts, calibration, rank=RANK)
    yield "in order", [adapted.network(place, head) for place, head in enumerate(heads)]
    options = {"bits": BITS}
    method = coin.Average(adapters={"rank": RANK}, compress=options)
    merged = coin.merge_networks(
        method, experts, coin.uniform(len(experts)), calibration=calibration
    )
    (packed,) = merged.compressed[f"{method.label}-{BITS}bit"]
    adapted = coin.Adapted(packed.network(), packed.adapters)
    yield "rounded by inputs", [adapted.network(place, head) for place, head in enumerate(heads)]


@torch.no_grad()
def measure(folder):
    """Yield a row for every stand-in, task and block of a seed's folder."""
    found, tasks, _ = finished(folder)
    experts = list(found.values())
    blocks = [f"blocks.{place}" for place in range(len(experts[0].blocks))]
    samples = list(tasks.calibrations().values())
    for method, networks in stand_ins(experts, samples):
        for (name, expert), network in zip(found.items(), networks, strict=True):
            task = tasks.tasks[name]
            images, _ = task.splits.test[:]
            batches = Calibration.of([images], task.image_size)
            for block, error in errors(network, expert, batches, blocks).items():
                yield place_of(folder) | {
                    "method": method,
                    "task": name,
                    "block": block,
                    "error": error,
                }


if __name__ == "__main__":
    found = written(measure, __doc__, "layers.csv")
    print(found.pivot_table(index="block", columns="method", values="error").round(4).to_string())
