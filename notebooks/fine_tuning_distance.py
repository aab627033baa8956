"""How far fine-tuning went: folders of seeds → a CSV with a row for every expert.

    python notebooks/fine_tuning_distance.py runs/fine-tuning/*/seed-* --output distance.csv

The distance is ‖θ_i − θ_0‖ / ‖θ_0‖ from the shared start, over the parameters of the body and over those of the head.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch

from coin.networks import load_network
from coin.networks.heads import head_name


def distances(folder):
    """Yield a row for every expert of a seed's folder."""
    seed = int(folder.name.removeprefix("seed-"))
    for path in sorted((folder / "experts").glob("*/expert.safetensors")):
        file = load_network(path)
        start = dict(
            load_network(folder.parent / f"base/initial-{file.num_classes}.safetensors").network.named_parameters()
        )
        moved, head = {"body": [0.0, 0.0], "head": [0.0, 0.0]}, head_name(file.network)
        for name, weights in file.network.named_parameters():
            part = moved["head" if name.startswith(f"{head}.") else "body"]
            part[0] += (weights - start[name]).double().square().sum().item()
            part[1] += start[name].double().square().sum().item()
        shares = {part: (change / size) ** 0.5 for part, (change, size) in moved.items()}
        yield {"experiment": folder.parent.name, "seed": seed, "task": path.parent.name, **shares}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="the folders of seeds")
    parser.add_argument("--output", type=Path, required=True, help="the CSV to write")
    given = parser.parse_args()
    with torch.no_grad():
        rows = [row for folder in given.folders for row in distances(folder)]
    pd.DataFrame(rows).round(5).to_csv(given.output, index=False)
