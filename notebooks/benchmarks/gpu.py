"""Time and peak memory of the heavy steps on a GPU, or in small on a CPU; run by ``make bench-gpu``.

The steps are the exact Fisher, `Refit`, the servers' answers, the fit and the use of every decoder, and a training step
(forward, backward, SGD), of ResNet50 and ViT-B/16 with random weights and images, in float32 (without TF32) and
bfloat16, but what has full precision by design. Times are medians after a warm-up, and are divided by the time of
forward passes of the same samples in the same precision. A step that fails is reported in its row, the others go on,
and the exit status is 1.
Each row goes to stdout as a line of JSON when it is measured.
"""

import argparse
import copy
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import coin
from coin.errors import CoinError
from coin.networks import NetworkConfig, build_network

CLASSES = 10
PRECISIONS = "float32", "bfloat16"
SIZES = {
    "cuda": {"side": 224, "samples": 100, "batch": 50, "repeats": 5, "memory_mib": 16384},
    "cpu": {"side": 64, "samples": 2, "batch": 2, "repeats": 3, "memory_mib": 1024},
}
"""The images' side, the samples of each of the two tasks, those in a batch, the repeats after the warm-up, and what a
Fisher pass and the activations of `Refit` may take."""


class Step(NamedTuple):
    """A function to time; `forwards` samples are forwarded in the time it is divided by."""

    step: str
    precision: str
    forwards: int
    run: Callable[[], object]


def build(name: str, side: int, device: torch.device) -> list[nn.Module]:
    """Return two experts, whose weights differ a little."""
    config = NetworkConfig(
        name, side, options={"image_size": side} if name.startswith("vit") else {}
    )
    torch.manual_seed(0)
    experts = [build_network(config, CLASSES).eval().to(device) for _ in range(2)]
    with torch.no_grad():
        for expert in experts:
            for (
                parameter
            ) in expert.parameters():  # no head of zeros either, such as that of torchvision's ViT
                parameter += (
                    0.01 * (parameter.std(correction=0) + 0.1) * torch.randn_like(parameter)
                )
    return experts


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a step of this precision runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def network_steps(expert: nn.Module, batches: list[Tensor], memory_mib: int) -> Iterator[Step]:
    """Yield the forward pass, to which all other steps are compared, and the Fisher."""

    @torch.no_grad()
    def forward(precision: str) -> None:
        with autocast(batches[0].device, precision):
            for batch in batches:
                expert(batch)

    def fisher(precision: str) -> None:
        network = copy.deepcopy(expert).bfloat16() if precision == "bfloat16" else expert
        coin.fisher_diagonal(network, batches, memory_mib=memory_mib)

    samples = sum(map(len, batches))
    yield from (
        Step("forward", precision, samples, partial(forward, precision)) for precision in PRECISIONS
    )
    yield from (
        Step("fisher", precision, samples, partial(fisher, precision)) for precision in PRECISIONS
    )


def training_steps(expert: nn.Module, inputs: Tensor) -> Iterator[Step]:
    """Yield a step of SGD on one batch."""
    network = copy.deepcopy(expert).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    labels = torch.arange(len(inputs), device=inputs.device) % CLASSES

    def train(precision: str) -> None:
        with autocast(inputs.device, precision):
            loss = nn.functional.cross_entropy(network(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    yield from (
        Step("training step", precision, len(inputs), partial(train, precision))
        for precision in PRECISIONS
    )


def refit_steps(
    experts: list[nn.Module], tasks: list[list[Tensor]], memory_mib: int
) -> Iterator[Step]:
    """Yield `Refit` of the experts, compared to its own passes: an expert on its task, the coded model on all."""
    forwards = 2 * sum(len(batch) for task in tasks for batch in task)

    def refit() -> None:
        coin.merge_networks(
            coin.Refit(memory_mib=memory_mib), experts, coin.uniform(2), calibration=tasks
        )

    yield Step("refit", "float32", forwards, refit)


def decoder_steps(experts: list[nn.Module], tasks: list[list[Tensor]]) -> Iterator[Step]:
    """Yield the answers of all three servers, and the fit and use of the decoders for the loss of the first expert."""
    pooled, code = [batch for task in tasks for batch in task], coin.uniform(2)
    samples = sum(map(len, pooled))
    system = coin.Coded(
        code, experts, coin.merge_networks(coin.Average(), experts, code, calibration=tasks)
    )

    def answers(precision: str) -> coin.Answers:
        with autocast(pooled[0].device, precision):
            return coin.Answers.concatenate(
                [system.answers(batch, features=True) for batch in pooled]
            )

    yield from (
        Step("answers", precision, 3 * samples, partial(answers, precision))
        for precision in PRECISIONS
    )
    task_of = [index for index, task in enumerate(tasks) for batch in task for _ in batch]
    known = replace(answers("float32"), tasks=torch.tensor(task_of, device=pooled[0].device))
    for kind in coin.DecoderKind:
        decoder = coin.make_decoder(kind, code, [0], system.heads(pooled[0]))
        for verb in ("fit", "decode"):
            yield Step(f"{kind} {verb}", "float32", samples, partial(getattr(decoder, verb), known))


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of the repeats after one warm-up."""
    found = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def measure(
    step: Step, device: torch.device, repeats: int, forward: dict[str, float]
) -> dict[str, Any]:
    """Return a step's row; `forward` is filled with the time of one sample's forward pass, by precision."""
    row: dict[str, Any] = {
        "step": step.step,
        "precision": step.precision,
        "forwards": step.forwards,
        "failed": "",
    }
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        row["seconds"] = seconds_of(step.run, device, repeats)
    except (RuntimeError, CoinError) as error:  # out of memory, say
        return row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    if step.step == "forward":
        forward[step.precision] = row["seconds"] / step.forwards
    if step.precision in forward:
        row["ratio_to_forward"] = row["seconds"] / (step.forwards * forward[step.precision])
    on_gpu = device.type == "cuda"  # else the process's peak so far
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return row | {"peak_mib": peak / 2**20}


def steps_of(name: str, sizes: dict[str, int], device: torch.device) -> Iterator[Step]:
    """Yield all steps of a network."""
    experts, shape = (
        build(name, sizes["side"], device),
        (sizes["samples"], 3, sizes["side"], sizes["side"]),
    )
    tasks = [list(torch.randn(shape, device=device).split(sizes["batch"])) for _ in experts]
    yield from network_steps(experts[0], tasks[0], sizes["memory_mib"])
    yield from training_steps(experts[0], tasks[0][0])
    yield from refit_steps(experts, tasks, sizes["memory_mib"])
    yield from decoder_steps(experts, tasks)


def main() -> int:
    """Print a line of JSON for each step, and return whether one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", default=["resnet50", "vit_b_16"], help="torchvision's names"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for size in SIZES["cpu"]:
        parser.add_argument(
            f"--{size.replace('_', '-')}", type=int, help="in place of that in SIZES"
        )
    options = parser.parse_args()
    device = torch.device(options.device)
    if on_gpu := device.type == "cuda":
        torch.cuda.set_device(device)
    given = {key: value for key in SIZES["cpu"] if (value := getattr(options, key)) is not None}
    sizes = SIZES["cuda" if on_gpu else "cpu"] | given
    torch.backends.cudnn.allow_tf32 = False  # as in a Fisher pass and in Refit
    told = {"device": torch.cuda.get_device_name() if on_gpu else "CPU", "torch": torch.__version__}
    print(json.dumps(told | sizes | {"tasks": 2, "classes": CLASSES}))
    failed = False
    for name in options.networks:
        forward: dict[str, float] = {}
        for step in steps_of(name, sizes, device):
            row = {"network": name} | measure(step, device, sizes["repeats"], forward)
            print(json.dumps(row), flush=True)
            failed |= bool(row["failed"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
