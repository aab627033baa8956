"""What merging and evaluating take at size: many experts of ResNet50 at 224 pixels, beside their own forward passes.

    python tests/benchmarks/size.py [--network resnet50@224] [--experts N] [--samples P]

Random weights and images, one thread. Every step is a process of its own: the exact Fisher of one expert, `Refit`
(own), and the evaluation of five decoders on two test samples a task. ``ratio`` is its processor time over that of the
network runs in it (of the Fisher over one forward and C backward passes, the engine's limit); ``MiB`` is how far the
process's high-water mark rises over what the networks and images took.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import coin
from coin.networks import NetworkConfig, build_network
from coin.statistics.guard import evaluating

CLASSES, TESTS = 10, 2
DECODERS = ("linear", "ridge", "feature_ridge", "expert_head", {"kind": "expert_head", "fitted_on": "own"})


def build(network: str, count: int, samples: int) -> tuple[list[nn.Module], list[list[Tensor]]]:
    """Return experts whose weights differ a little, and each one's batches of images."""
    name, _, side = network.partition("@")
    torch.manual_seed(0)
    config = NetworkConfig(name, int(side))
    experts = [build_network(config, CLASSES, seed=0).eval() for _ in range(count)]
    with torch.no_grad():
        for expert in experts:
            for parameter in expert.parameters():
                parameter += 0.01 * parameter.std(correction=0) * torch.randn_like(parameter)
    return experts, [list(torch.rand(samples, 3, int(side), int(side)).split(8)) for _ in experts]


def processor_seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def forward(network: nn.Module, batches: list[Tensor]) -> None:
    with evaluating(network, gradients=False):
        for batch in batches:
            network(batch)


def limit(network: nn.Module, batches: list[Tensor]) -> None:
    for batch in batches:
        logits = network(batch)
        for c in range(CLASSES):
            logits[:, c].sum().backward(retain_graph=c + 1 < CLASSES)


def measure(step: str, network: str, count: int, samples: int) -> str:
    """Return a line: the step's processor seconds, those of its passes, their ratio, MiB."""
    experts, tasks = build(network, 1 if step == "fisher" else count, samples)
    code = coin.uniform(len(experts))
    forward(experts[0], tasks[0][:1])
    if step == "fisher":
        passes, run = 0.0, partial(coin.fisher_diagonal, experts[0], tasks[0])
    else:
        passes = processor_seconds(lambda: [forward(*each) for each in zip(experts, tasks, strict=True)])
        if step == "refit":
            # The coded network on all samples takes as long as every expert on its own; the head wants all on all.
            passes *= 2 + count
            options = {"calibration": tasks}
            run = partial(coin.merge_networks, coin.Refit("own", memory_mib=2560), experts, code, **options)
        else:
            passes *= (count + 1) * (1 + TESTS / samples)  # all networks on all tasks' samples, and on their tests
            coded = coin.merge_networks(coin.Average(), experts, code, calibration=tasks)
            system = coin.Coded(code, experts, coded)
            tests = [[(batches[0][:TESTS], torch.arange(TESTS) % CLASSES)] for batches in tasks]
            run = partial(coin.evaluate, system, tests, decoders=DECODERS, calibration=tasks)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = processor_seconds(run)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    passes = passes or processor_seconds(lambda: limit(experts[0], tasks[0]))
    return f"{step:10} {seconds:10.1f} {passes:10.1f} {seconds / passes:6.2f} {grown:8.0f}"


def main() -> None:
    """Print a line for every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50@224", help="NAME@SIDE")
    parser.add_argument("--experts", type=int, default=10)
    parser.add_argument("--samples", type=int, default=200, help="P, of each task")
    parser.add_argument("--steps", nargs="+", default=["fisher", "refit", "evaluate"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(1)
        print(measure(given.one, given.network, given.experts, given.samples))
        return
    print(f"{'step':10} {'CPU s':>10} {'passes s':>10} {'ratio':>6} {'MiB':>8}", flush=True)
    options = [f"--network={given.network}", f"--experts={given.experts}", f"--samples={given.samples}"]
    for step in given.steps:
        subprocess.run([sys.executable, "-W", "ignore", __file__, f"--one={step}", *options], check=True)


if __name__ == "__main__":
    main()
