"""The exact Fisher diagonal's time, memory and error beside other ways to it; run by ``make bench``.

The yardstick ("the limit") is one forward and C ordinary batched backward passes on the same samples. All candidates
run in turn in one process, on one thread, and are compared by the medians of their CPU times;
peak memory is taken in a fresh process per candidate. With ``--check`` only coin and the limit run, and the exit status
says whether a ratio is above what the network is held to.

    python notebooks/benchmarks/fisher.py [--check] [--networks NAME ...] [--samples P ...] [--repeats N]
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pandas as pd
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torchvision.models.vision_transformer import VisionTransformer

from coin.statistics import fisher_diagonal

CLASSES = 10
CHECKED = 2  # samples on which the errors are taken, against the loop in float64

Candidate = Callable[[nn.Module, Tensor], dict[str, Tensor]]


def vit() -> nn.Module:
    """ViT-B/16 with 4 of its 12 layers, on 32×32: 4 patches and the class token."""
    network = VisionTransformer(32, 16, 4, 12, 768, 3072, num_classes=CLASSES)
    nn.init.normal_(
        network.heads.head.weight, std=0.02
    )  # torchvision's is zero, and so would be every gradient
    return network


NETWORKS: dict[str, tuple[int, float]] = {
    "resnet18": (32, 0.85),
    "resnet50": (32, 0.65),
    "densenet121": (32, 1.35),
    "efficientnet_b0": (64, 1.15),
    "mobilenet_v2": (64, 1.65),
    "mobilenet_v3_small": (64, 1.15),
    "regnet_y_400mf": (64, 1.45),
    "convnext_tiny": (64, 1.55),
    "vit_b_16": (32, 1.2),
}
"""Name → the images' side, and the ratio to the limit that ``--check`` holds the network to at P = 8: about 1.6 times
what the slower of two processors took, more than a busy machine adds."""


def limit(network: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Take the gradients of one backward pass a class: no exact Fisher is quicker."""
    network.zero_grad()
    outputs = network(inputs)
    for c in range(CLASSES):
        outputs[:, c].sum().backward(retain_graph=c < CLASSES - 1)
    return {}


def coin(network: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Return the exact Fisher diagonal as `coin` computes it."""
    return fisher_diagonal(network, [inputs])


def naive(network: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Return it by a backward pass for every sample and class."""
    parameters = dict(network.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x in inputs:
        outputs = network(x[None])[0]
        for c in range(CLASSES):
            gradients = torch.autograd.grad(
                outputs[c], list(parameters.values()), retain_graph=c < CLASSES - 1
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name].addcmul_(gradient, gradient)
    return {name: value / len(inputs) for name, value in total.items()}


def vmap_of_vjp(network: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Every sample's Jacobian by vmap over vjp, as curvlinops' exact diagonal of the Gauss-Newton matrix has it."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    buffers = dict(network.named_buffers())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x in inputs:
        _, pull_back = vjp(
            lambda p, x=x: functional_call(network, {**p, **buffers}, x[None])[0], parameters
        )
        (jacobian,) = torch.vmap(pull_back)(torch.eye(CLASSES, dtype=x.dtype))
        for name, rows in jacobian.items():
            total[name] += rows.square_().sum(0)
    return {name: value / len(inputs) for name, value in total.items()}


def build(name: str) -> nn.Module:
    """Return a network of random weights, the same at each call."""
    torch.manual_seed(0)
    make = (
        vit
        if name == "vit_b_16"
        else lambda: torchvision.models.get_model(name, num_classes=CLASSES)
    )
    return make().eval()


def candidates(name: str, *, check: bool = False) -> dict[str, tuple[Candidate, nn.Module]]:
    """Return each candidate with a network of its own, all of the same weights."""
    functions: dict[str, Candidate] = {"limit": limit, "coin": coin}
    if not check:
        functions |= {"loop": naive, "vmap of vjp": vmap_of_vjp}
    return {key: (function, build(name)) for key, function in functions.items()}


def peak_mib(name: str, samples: int, candidate: str) -> float:
    """Return how far a candidate raises the high-water mark of a fresh process, beyond one sample's pass, in MiB."""
    command = [sys.executable, __file__, "--peak", name, str(samples), candidate]
    finished = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
    return float(finished.stdout.split()[-1])


def measure_peak(name: str, samples: int, candidate: str) -> None:
    """Print by how many MiB a candidate raises this process's high-water mark, beyond one sample's pass."""
    function, network = candidates(name, check=candidate in ("limit", "coin"))[candidate]
    function(network, images(name, 1))  # libraries allocate on their first call
    network.zero_grad()
    inputs = images(name, samples)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function(network, inputs)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def tensor_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest error of a tensor, relative to its largest entry; to that of all if it is but rounding."""
    largest = max(float(value.max()) for value in expected.values())
    return max(
        float((found[name].double() - value).abs().max()) / max(float(value.max()), 1e-12 * largest)
        for name, value in expected.items()
    )


def seconds_of(
    chosen: dict[str, tuple[Candidate, nn.Module]], inputs: Tensor, repeats: int
) -> dict[str, float]:
    """Return the medians of each candidate's CPU seconds; the slow ones need fewer turns for the same certainty."""
    seconds: dict[str, list[float]] = {key: [] for key in chosen}
    for turn in range(repeats + 1):
        for key, (function, network) in chosen.items():
            if not key.startswith(("limit", "coin")) and turn > 2:
                continue
            start = time.process_time()
            function(network, inputs)
            if turn:  # the first turn warms up
                seconds[key].append(time.process_time() - start)
            network.zero_grad()
    return {key: statistics.median(values) for key, values in seconds.items()}


def images(name: str, samples: int) -> Tensor:
    """Return random images, P×3×H×W, the same at each call."""
    side = NETWORKS[name][0]
    return torch.randn(samples, 3, side, side, generator=torch.Generator().manual_seed(1))


def run(name: str, samples: int, repeats: int) -> list[dict[str, object]]:
    """Return a row for each candidate."""
    chosen, inputs = candidates(name), images(name, samples)
    checked = inputs[:CHECKED]
    expected = naive(build(name).double(), checked.double())
    seconds = seconds_of(chosen, inputs, repeats)
    rows = []
    for key, (function, network) in chosen.items():
        row: dict[str, object] = {"network": name, "P": samples, "candidate": key}
        row |= {
            "ratio to limit": seconds[key] / seconds["limit"],
            "peak MiB": peak_mib(name, samples, key),
        }
        if key != "limit":
            row["max tensor error"] = tensor_error(function(network, checked), expected)
        rows.append(row)
    return rows


def check(names: list[str], repeats: int) -> int:
    """Hold the ratios to their bounds; one that is above is measured once more, since a machine may have been busy."""
    failed = 0
    for name in names:
        bound, chosen, inputs = NETWORKS[name][1], candidates(name, check=True), images(name, 8)
        for _ in range(2):
            seconds = seconds_of(chosen, inputs, repeats)
            if (ratio := seconds["coin"] / seconds["limit"]) <= bound:
                break
        print(
            f"{name}: {ratio:.2f} of the limit, held to {bound:.2f}{'' if ratio <= bound else ': TOO SLOW'}"
        )
        failed += ratio > bound
    return failed


def main() -> int:
    """Print the table, or with ``--check`` return how many networks are too slow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="coin's ratio to the limit alone, against its bound"
    )
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument(
        "--samples", nargs="+", type=int, default=[8], help="P, the samples in a batch"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="interleaved turns after the first one"
    )
    parser.add_argument(
        "--peak", nargs=3, metavar=("NETWORK", "P", "CANDIDATE"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        measure_peak(options.peak[0], int(options.peak[1]), options.peak[2])
        return 0
    if options.check:
        return check(options.networks, options.repeats)
    rows = [
        row
        for name in options.networks
        for samples in options.samples
        for row in run(name, samples, options.repeats)
    ]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format, na_rep="–"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
