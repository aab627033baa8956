"""What `Refit` takes beside its own forward passes: each expert on its samples, and the coded network once on all.

    python tests/benchmarks/refit.py [--networks timm/tf_efficientnet_lite0@64 resnet50@224 ...] [--samples P]

Two experts of random weights, P random images each, one process and thread. Times are the least of ``--repeats``; the
memory is how far the process's high-water mark rises over what it was before the refit.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch

from coin.merging import Experts, Refit
from coin.networks import NetworkConfig, build_network
from coin.statistics.guard import evaluating


def measure(network: str, samples: int, target: str, repeats: int) -> str:
    """Return a line: seconds of the passes and of the refit, their ratio, MiB."""
    name, _, size = network.partition("@")
    torch.manual_seed(0)
    networks = [build_network(NetworkConfig(name, int(size)), 10, seed=0).eval() for _ in range(2)]
    with torch.no_grad():
        for one in networks:
            for parameter in one.parameters():
                parameter += 0.01 * parameter.std(correction=0) * torch.randn_like(parameter)
    tasks = [list(torch.rand(samples, 3, int(size), int(size)).split(64)) for _ in networks]
    pooled = torch.cat([torch.cat(task) for task in tasks])
    passes, refits = [], []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(repeats):
        began = time.perf_counter()
        for one, own in zip(networks, tasks, strict=True):
            with evaluating(one, gradients=False):
                for batch in own if target == "own" else pooled.split(64):
                    one(batch)
        with evaluating(networks[0], gradients=False):
            for batch in pooled.split(64):
                networks[0](batch)
        passes.append(time.perf_counter() - began)
        began = time.perf_counter()
        Refit(target, head=False, memory_mib=16384).make(Experts(networks, calibration=tasks), [0.5, 0.5])
        refits.append(time.perf_counter() - began)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    ratio = min(refits) / min(passes)
    return f"{network:28} {min(passes):8.2f} {min(refits):8.2f} {ratio:6.2f} {grown:8.0f}"


def main() -> None:
    """Print a line for every network, each measured in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["timm/tf_efficientnet_lite0@64", "resnet50@64", "timm/vit_small_patch16_224@224", "resnet50@224"]
    parser.add_argument("--networks", nargs="+", default=every)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--target", default="own")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(1)
        print(measure(given.one, given.samples, given.target, given.repeats))
        return
    print(f"{'network':28} {'passes s':>8} {'refit s':>8} {'ratio':>6} {'MiB':>8}", flush=True)
    options = [f"--samples={given.samples}", f"--target={given.target}", f"--repeats={given.repeats}"]
    for network in given.networks:
        subprocess.run([sys.executable, "-W", "ignore", __file__, f"--one={network}", *options], check=True)


if __name__ == "__main__":
    main()
