"""The memory and the time of merging many ResNet50 experts, beside reading their files; run by ``make bench``.

Every merge is a fresh process that does what ``coin merge`` does: it checks and hashes all files, merges, and writes
the coded model. Memory is how far the process's high-water mark (VmHWM, mapped pages of files included) rises over what
it was before, as multiples of one model in float32. Time is wall and CPU time, beside those of reading every byte of
the same files into one buffer.

    python tests/benchmarks/merge.py [--experts N ...] [--methods average coin ...] [--network resnet50] [--files DIR]
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from coin.commands.merge import merge
from coin.merging import Average, Coin, RegMean, TaskArithmetic, Ties
from coin.networks import BatchNormPolicy, NetworkConfig, build_network, load_network, save_network
from coin.statistics import save_statistic

CLASSES = 10
OUTPUT = Path("runs/bench/merge.json")
METHODS = {
    "average": (Average, ()),
    "coin": (Coin, ("fisher",)),
    "task_arithmetic": (TaskArithmetic, ("initial",)),
    "ties": (Ties, ("initial",)),
    "regmean": (RegMean, ("gram",)),
}


def statistic_path(folder: Path, statistic: str, index: int) -> Path:
    return folder / f"expert-{index}.{statistic}.safetensors"


def write_files(folder: Path, config: NetworkConfig, count: int) -> None:
    """Write experts that differ everywhere, with Fishers and Gram matrices of the right shapes and random values."""
    for index in range(count):
        path = folder / f"expert-{index}.safetensors"
        if not path.is_file():
            draw = torch.Generator().manual_seed(index)
            network = build_network(config, CLASSES, seed=index)
            parameters = dict(network.named_parameters())
            fisher = {key: torch.rand(p.shape, generator=draw).square() for key, p in parameters.items()}
            made = {"samples": 200, "seconds": 0.0, "passes": 0.0, "data": "own"}
            save_statistic(statistic_path(folder, "fisher", index), fisher, network, **made)
            save_network(path, network, config, CLASSES, {"made_by": "a benchmark"})
    initial = folder / "initial.safetensors"
    if not initial.is_file():
        save_network(initial, build_network(config, CLASSES, seed=10**6), config, CLASSES, {"made_by": "a benchmark"})


def write_grams(folder: Path, count: int) -> None:
    """Write Gram matrices of all layers for the experts that are there."""
    for index in range(count):
        path = statistic_path(folder, "gram", index)
        if not path.is_file():
            network = load_network(folder / f"expert-{index}.safetensors").network
            draw = torch.Generator().manual_seed(index)
            grams = {}
            for key, parameter in network.named_parameters():
                if parameter.ndim > 1:
                    inputs = parameter[0].numel() + (parameter.ndim == 2)  # the head's bias
                    rows = torch.randn(1, 64, inputs, generator=draw)
                    grams[key] = rows.mT @ rows / 64
            save_statistic(path, grams, network, samples=64, seconds=0.0, passes=0.0, data="own")


def paths_of(folder: Path, method: str, count: int) -> dict[str, dict[str, str] | str]:
    """Return what ``coin merge`` is given: its files by their option."""
    wanted = METHODS[method][1]
    files: dict[str, dict[str, str] | str] = {
        "experts": {f"task{i}": str(folder / f"expert-{i}.safetensors") for i in range(count)}
    }
    for statistic in {"fisher", "gram"}.intersection(wanted):
        files[statistic] = {f"task{i}": str(statistic_path(folder, statistic, i)) for i in range(count)}
    if "initial" in wanted:
        files["initial"] = str(folder / "initial.safetensors")
    return files


def read_bytes(files: dict[str, dict[str, str] | str]) -> None:
    """Read every byte of the files into one buffer."""
    buffer = bytearray(2**24)
    for group in files.values():
        for path in [group] if isinstance(group, str) else group.values():
            with Path(path).open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def measured(task: str, method: str, count: int, folder: Path) -> dict[str, float]:
    """Do one task in this process, and return MiB of memory and seconds of wall and CPU time."""
    files = paths_of(folder, method, count)
    options: Any = files
    with tempfile.TemporaryDirectory() as small:  # libraries allocate, and load their code, on their first call
        write_files(Path(small), NetworkConfig("small_resnet", 32, None, {"width": 4}), 2)
        write_grams(Path(small), 2)
        first: Any = paths_of(Path(small), method, 2)
        merge(method=METHODS[method][0](batchnorm=BatchNormPolicy.average), output=small, **first)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    started, cpu = time.perf_counter(), time.process_time()
    if task == "merge":
        with tempfile.TemporaryDirectory(dir=folder) as output:
            merge(method=METHODS[method][0](batchnorm=BatchNormPolicy.average), output=output, **options)
    else:
        read_bytes(files)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"mib": (_status("VmHWM") - before) / 1024, "seconds": seconds, "cpu": cpu}


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def apart(task: str, method: str, count: int, folder: Path) -> dict[str, float]:
    """Return what `measured` finds in a fresh process, whose allocator is tuned as the command's."""
    command = [sys.executable, "-W", "ignore", __file__, "--task", task, method, str(count), "--files", str(folder)]
    tuned = {"OMP_WAIT_POLICY": "passive", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **tuned})
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", nargs="+", type=int, default=[3, 10, 20])
    parser.add_argument("--methods", nargs="+", default=["average", "coin"], choices=list(METHODS))
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--files", type=Path, help="where the experts are, or are written and left")
    parser.add_argument("--task", nargs=3, metavar=("TASK", "METHOD", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task, method, count = options.task
        print(json.dumps(measured(task, method, int(count), options.files)))
        return
    config = NetworkConfig(options.network, 32, None)
    model = sum(tensor.nbytes for tensor in build_network(config, CLASSES).state_dict().values()) / 2**20
    table = Table("method", "N", "peak, models", "seconds (CPU)", "× read (CPU)")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.files or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, config, max(options.experts))
        if "regmean" in options.methods:
            write_grams(folder, max(options.experts))
        for method in options.methods:
            for count in options.experts:
                apart("read", method, count, folder)  # from the disk; all that is timed comes from the page cache
                found = {task: apart(task, method, count, folder) for task in ("read", "merge")}
                results.append({"method": method, "experts": count, "model_mib": model, **found})
                own, read = found["merge"], found["read"]
                against = f"{own['seconds'] / read['seconds']:.2f} ({own['cpu'] / read['cpu']:.2f})"
                spent = f"{own['seconds']:.1f} ({own['cpu']:.1f})"
                table.add_row(method, str(count), f"{own['mib'] / model:.2f}", spent, against)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps({"network": asdict(config), "results": results}, indent=2) + "\n")
    Console().print(table)
    print(f"written to {OUTPUT}; one model is {model:.0f} MiB; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
