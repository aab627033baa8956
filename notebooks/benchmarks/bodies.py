"""Time a body with adapters beside the plain expert, interleaved in one process, and check the memory that it takes.

    python notebooks/benchmarks/bodies.py [--networks NAME …] [--seconds 3]

The body is in 4 bits with eight adapters of rank 16 for every layer, of random values: times do not depend on them.
First come the plain expert's processor milliseconds on one thread, the least of interleaved calls, by network, image
size (or number of tokens) and batch size and, as multiples of these, those of the packed body, its BatchNorms folded,
and, in a batch of 32, of eight mixed experts beside eight plain batches of four. Then what reading back and compressing
take. Last comes, for a process of its own each, by how many MiB it grows while it answers, beyond what activations
take, and `coin.Adapted`'s `resident_nbytes`. The exit status is 1 where
a number is beyond what is promised.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import coin
from coin.core.memory import keep_freed_memory
from coin.networks import Compression, NetworkConfig, build_network, head_name, save_network
from coin.networks.adapted import resident_nbytes
from coin.networks.batchnorm import folded, mark_folded
from coin.networks.files import open_network, save_compressed

LITE, VIT, MINILM = "timm/tf_efficientnet_lite0", "timm/vit_tiny_patch16_224", "MiniLM"
NETWORKS = (LITE, "resnet50", VIT, MINILM)
SIZES = {MINILM: (32,)}  # tokens; of the others pixels
EXPERTS, RANK, MIXED = 8, 16, 32
BATCHES = (1, 8, MIXED)
# By what is measured, small inputs or not, and the batch size: multiples of the plain expert's time.
LIMITS = {
    ("packed", True, 1): 1.45,
    ("packed", True, 8): 1.2,
    ("packed", False, 1): 1.2,
    ("packed", False, 8): 1.2,
}
LIMITS |= {("mixed", True, MIXED): 1.4}


def network_of(name: str, size: int) -> nn.Module:
    """Return a network of random weights."""
    if name != MINILM:
        return build_network(config_of(name, size), 10).eval()
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=10,
    )
    return BertForSequenceClassification(config).eval()


def inputs_of(name: str, size: int, batch: int) -> dict[str, Tensor]:
    """Return a batch as keyword arguments."""
    if name == MINILM:
        tokens = torch.randint(30_000, (batch, size))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {"x": torch.randn(batch, 3, size, size)}


def body_of(network: nn.Module) -> nn.Module:
    """Return a copy with its BatchNorms folded, each into the convolution that is listed before it."""
    body = deepcopy(network)
    before = ""
    for name, layer in list(body.named_modules()):
        if isinstance(layer, nn.Conv2d):
            before = f"{name}.weight"
        elif isinstance(layer, nn.BatchNorm2d):
            body.load_state_dict(
                body.state_dict() | folded(body.state_dict(), before, None, name, layer.eps)
            )
            mark_folded(body, {name: before})
    return body


def config_of(name: str, size: int) -> NetworkConfig:
    """Return the configuration of a network of random weights."""
    return NetworkConfig(name, size, None, options={"img_size": size} if name == VIT else {})


def adapters_of(network: nn.Module) -> list[coin.Adapter]:
    """Return adapters of rank 16 for every layer but the head, with the parts that those of `coin.Refit` have."""
    torch.manual_seed(0)
    head, changes = head_name(network), dict[str, dict[str, Tensor]]()
    for place, layer in network.named_modules():
        for name, parameter in layer.named_parameters(recurse=False) if place != head else ():
            if parameter.ndim == 1 and name != "weight":
                changes[f"{place}.{name}"] = {"shift": 0.01 * torch.randn_like(parameter)}
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                outputs, columns = parameter.flatten(1).shape
                parts = {"scale": 1 + 0.01 * torch.randn(outputs, *[1] * (parameter.ndim - 1))}
                if getattr(layer, "groups", 1) == 1:
                    rank = min(RANK, outputs, columns)
                    parts |= {
                        "left": 0.01 * torch.randn(outputs, rank),
                        "right": 0.1 * torch.randn(rank, columns),
                    }
                changes[f"{place}.{name}"] = parts
    return [coin.Adapter(changes) for _ in range(EXPERTS)]


def milliseconds(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the least processor milliseconds of every call, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end, turn = time.monotonic() + seconds, 0
    while time.monotonic() < end or turn < 7:
        for name, call in calls.items():
            began = time.thread_time()
            call()
            if turn > 1:  # the first ones warm up
                times[name].append(1e3 * (time.thread_time() - began))
        turn += 1
    return {name: min(each) for name, each in times.items()}


@torch.inference_mode()
def timed(name: str, size: int, seconds: float) -> list[dict[str, object]]:
    """Return a row for every batch size."""
    network = network_of(name, size)
    body = body_of(network)
    adapters = adapters_of(body)
    packed = coin.Adapted(coin.compress(body, None, bits=4, base_bits=0).packed(), adapters)
    rows = []
    for batch in BATCHES:
        inputs = inputs_of(name, size, batch)
        if batch == MIXED:
            few = {key: value[: batch // EXPERTS] for key, value in inputs.items()}
            mixed = partial(call, packed, inputs, experts=torch.arange(batch) % EXPERTS)
            found = milliseconds({"mixed": mixed, "plain": partial(call, network, few)}, seconds)
            rows[-1]["mixed"] = found["mixed"] / (EXPERTS * found["plain"])
            continue
        calls = {
            "plain": partial(call, network, inputs),
            "packed": partial(call, packed, inputs, experts=0),
        }
        found = milliseconds(calls, seconds)
        row: dict[str, object] = {
            "network": name,
            "size": size,
            "batch": batch,
            "plain ms": found["plain"],
        }
        row["packed"] = found["packed"] / found["plain"]
        rows.append(row)
    return rows


def call(network: nn.Module, inputs: dict[str, Tensor], **named: object) -> object:
    """Return what a network makes of a batch, images as its one argument."""
    return network(inputs["x"], **named) if "x" in inputs else network(**inputs, **named)


def compression(name: str) -> dict[str, object]:
    """Return the wall seconds in which a network is compressed to 4 bits and read back, on two threads."""
    network = network_of(name, 64)
    torch.set_num_threads(2)
    best = {"network": name, "compress s": float("inf"), "read back s": float("inf")}
    for _ in range(3):
        began = time.perf_counter()
        made = coin.compress(network, None, bits=4, base_bits=0)
        middle = time.perf_counter()
        made.network()
        best["compress s"] = min(best["compress s"], middle - began)
        best["read back s"] = min(best["read back s"], time.perf_counter() - middle)
    torch.set_num_threads(1)
    return best


def memory(kind: str) -> float:
    """Return ``VmRSS`` or, since it was last asked for, ``VmHWM`` of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = float(next(line for line in lines if line.startswith(kind)).split()[1]) / 1024
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    return found


def held() -> float:
    """Return the MiB that this process holds, after it has given back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory("VmRSS")


@torch.inference_mode()
def grown(path: Path) -> tuple[float, float]:
    """Return by how many MiB this process grows that answers with a file's network, and what that should be.

    It has answered with another such network before, so that code is loaded. Activations are those of a plain network.
    Blocks of 64 KiB and more go back to the system when they are freed, so that only what is in use counts.
    """
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
    file = open_network(path)
    images = torch.randn(1, 3, file.config.image_size, file.config.image_size)
    answering = file.module()
    options = {"experts": 0} if isinstance(answering, coin.Adapted) else {}
    answering(images, **options)
    network = build_network(file.config, file.num_classes).eval()
    network(images)
    before = held()
    network(images)
    activations = memory("VmHWM") - before
    del network, file, answering
    begun = held()
    answering = open_network(path).module()
    for _ in range(3):
        answering(images, **options)
    now = held()
    answering(images, **options)
    peak = memory("VmHWM") - now - activations
    return now - begun + max(0.0, peak), resident_nbytes(answering) / 2**20


def resident(name: str, size: int, folder: Path) -> list[dict[str, object]]:
    """Return a row for each way to hold a network, of a process of its own."""
    config = config_of(name, size)
    network = network_of(name, size)
    save_network(folder / "plain.safetensors", network, config, 10, {})
    body = body_of(network)
    made = coin.compress(body, None, bits=4, base_bits=0)
    made.adapters = adapters_of(body)
    save_compressed(folder / "packed.safetensors", made, config, 10, None, Compression(4, 0), {})
    rows = []
    for kind in ("plain", "packed"):
        path = folder / f"{kind}.safetensors"
        command = [sys.executable, "-W", "ignore", __file__, "--grown", str(path)]
        found, expected = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
        rows.append({"network": name, "kind": kind, "grown MiB": found, "resident MiB": expected})
    return rows


def show(rows: list[dict[str, object]]) -> pd.DataFrame:
    """Print rows as a table and return it."""
    table = pd.DataFrame(rows)
    print(table.round(2).to_string(index=False, na_rep=""), "\n", flush=True)
    return table


def main() -> int:
    """Print the tables, and return whether anything is beyond what is promised."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--grown", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.grown is not None:
        print(json.dumps(grown(options.grown)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        sizes = [
            row
            for name in options.networks
            if name != MINILM
            for row in resident(name, 64, Path(folder))
        ]
    keep_freed_memory()
    times = []
    for name in options.networks:
        for size in SIZES.get(name, (64, 224)):
            times += timed(name, size, options.seconds)
    found = show(times)
    show([compression(name) for name in options.networks])
    grew = show(sizes)
    wrong = []
    for _, row in found.iterrows():
        for kind in ("packed", "mixed"):
            is_small = row["size"] <= 64
            most = LIMITS.get((kind, is_small, row["batch"] if kind == "packed" else MIXED))
            if (row["network"], kind, row["batch"], is_small) == (LITE, "packed", 1, True):
                most = 1.15
            if most is not None and row.get(kind) > most:
                place = f"{row['network']}, size {row['size']}, batch {row['batch']}"
                wrong.append(f"{place}: {kind} {row[kind]:.2f}, expected at most {most}")
    wrong += [
        f"{row['network']}: {row['kind']} grew by {row['grown MiB']:.1f} MiB, expected {row['resident MiB']:.1f}"
        for _, row in grew.iterrows()
        if abs(row["grown MiB"] - row["resident MiB"]) > 0.1 * row["resident MiB"]
    ]
    print("\n".join(wrong) or "all as promised")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
