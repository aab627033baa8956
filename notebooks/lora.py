"""Fully fine-tuned networks as LoRAs of their base, on finished experts without BatchNorm: folders of seeds → CSV.

    python notebooks/lora.py runs/NAME/seed-* --output lora.csv

For every expert and rank what `coin.extract_lora` keeps of it, and what a singular value decomposition of W_i − W₀
does (``svd``), as peft's ``convert_to_lora`` cuts what it is given, both with the expert's own head and the base's
biases and normalisations; and that decomposition with the expert's own ones (``svd, own vectors``), which no LoRA has.
"""

from tempfile import TemporaryDirectory

import torch
from rivals import body_of, classes_of, filled, finished, place_of, written

import coin
from coin.networks.heads import replace_head

RANKS = 4, 8, 16


def svd(network, base, names, rank):
    """Return the base's weights of these names with the network's differences cut to a rank."""
    found = {}
    for name in names:
        step = network[name] - base[name]
        u, s, v = torch.linalg.svd(step.flatten(1), False)
        low_rank = (u[:, :rank] * s[:rank]) @ v[:rank]
        found[name] = base[name] + low_rank.reshape(step.shape)
    return found


def ways(expert, base, samples, rank):
    """Yield (way, the network with what it keeps of an expert)."""
    own = body_of(expert)
    start = filled(expert, body_of(base))  # with the expert's head
    with TemporaryDirectory() as folder:
        made = coin.extract_lora(expert, start, samples, rank, folder)
    yield "extract_lora", made
    before = body_of(start)
    changed = [name for name, tensor in body_of(made).items() if not tensor.equal(before[name])]
    cut = svd(own, body_of(base), changed, rank)
    yield "svd", filled(start, cut)
    vectors = {name: tensor for name, tensor in own.items() if name not in cut}
    yield "svd, own vectors", filled(start, {**vectors, **cut})


@torch.no_grad()
def measure(folder):
    """Yield a row for every expert, rank and way of a seed's folder."""
    experts, tasks, base = finished(folder)
    for name, expert in experts.items():
        task = tasks.tasks[name]
        replace_head(base, task.num_classes)
        labels = task.splits.test.targets
        wanted = classes_of(expert, task)
        right = float((wanted == labels).double().mean())
        samples = tasks.calibrations()[name]
        for rank in RANKS:
            for way, network in ways(expert, base, samples, rank):
                found = classes_of(network, task)
                decoded = float((found == labels).double().mean())
                yield place_of(folder) | {
                    "way": way,
                    "rank": rank,
                    "task": name,
                    "expert_accuracy": right,
                    "nda": decoded / right,
                    "agreement": float((found == wanted).double().mean()),
                }


if __name__ == "__main__":
    found = written(measure, __doc__, "lora.csv")
    columns = found.groupby(["rank", "way"])[["nda", "agreement"]].mean()
    print(columns.unstack("way").round(4).to_string())
