"""Fully fine-tuned networks as LoRAs of their base, on finished experts without BatchNorm: folders of seeds → CSV.

    python notebooks/lora.py runs/NAME/seed-* --output lora.csv

For every expert and rank what `coin.extract_lora` keeps of it, and what a singular value decomposition of W_i − W₀
does (``svd``), as peft's ``convert_to_lora`` cuts what it is given, both with the expert's own head and the base's
biases and normalisations; and that decomposition with the expert's own ones (``svd, own vectors``), which no LoRA has.
Ours has factors in 4 bits, theirs in float32.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from rivals import body_of, filled
from silent_faults import tasks_of

import coin
from coin.data.samples import Calibration
from coin.files.yaml import read_yaml
from coin.networks import load_network, run_network
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
        adapter = coin.extract_lora(expert, start, samples, rank, folder)
    yield "extract_lora", adapter.applied_to(start)
    cut = svd(own, body_of(base), adapter.changes, rank)
    yield "svd", filled(start, cut)
    vectors = {name: tensor for name, tensor in own.items() if name not in adapter.changes}
    yield "svd, own vectors", filled(start, {**vectors, **cut})


@torch.no_grad()
def measure(folder):
    """Yield a row for every expert, rank and way of a seed's folder."""
    names = list(read_yaml(folder / "config.yaml")["tasks"])
    files = [load_network(folder / "experts" / name / "expert.safetensors") for name in names]
    size = files[0].config.image_size
    tasks = tasks_of(folder, names, size)
    initial = f"initial-{max(file.num_classes for file in files)}.safetensors"
    base = load_network(folder.parent / "base" / initial).network
    for name, file in zip(names, files, strict=True):
        expert = file.network
        replace_head(base, file.num_classes)
        test = tasks.tasks[name].splits.test

        def answers(network, test=test):
            batches = Calibration.of(test, size)
            return torch.cat([run_network(network, x, features=False).logits for x in batches])

        wanted = answers(expert).argmax(1)
        right = float((wanted == test.targets).double().mean())
        samples = tasks.calibrations()[name]
        for rank in RANKS:
            for way, network in ways(expert, base, samples, rank):
                found = answers(network).argmax(1)
                decoded = float((found == test.targets).double().mean())
                yield {
                    "experiment": folder.parent.name,
                    "seed": int(folder.name.removeprefix("seed-")),
                    "way": way,
                    "rank": rank,
                    "task": name,
                    "expert_accuracy": right,
                    "nda": decoded / right,
                    "agreement": float((found == wanted).double().mean()),
                }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="folders of seeds")
    parser.add_argument("--output", type=Path, default=Path("lora.csv"), help="the CSV to write")
    given = parser.parse_args()
    found = pd.DataFrame([row for folder in given.folders for row in measure(folder)])
    found.to_csv(given.output, index=False)
    columns = found.groupby(["rank", "way"])[["nda", "agreement"]].mean()
    print(columns.unstack("way").round(4).to_string())
