"""Kill experts' processes under a client of ``coin serve --policy=standin``, and say what it got.

    python tests/benchmarks/standins.py runs/smallest --method=refit --decoder=expert_head --seconds 20

While no expert, one and all of them are killed (``kill -9``, again as soon as Ray has started another), the client asks
for every task in turn, with its test images. Every answer must be that of the expert or of the coded model alone with
the decoder, as they answer here, and name the server. A table says for each phase how many answers there were, how many
were decoded, of how many the class is that of the expert itself, failures, and milliseconds; the last line compares the
bytes on disk with ``memory_mib``. The exit status is 1 where an answer is another, or there is none.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import cycle
from pathlib import Path

import httpx
import numpy as np
import torch

from coin.commands.coded_system import Choice, CodedSystem, read_coded_system
from coin.files.safetensors import load_provenance
from coin.serving.decodings import Decodings
from coin.serving.limits import InputLimits
from coin.serving.model import NetworkServer
from coin.serving.requests import read_array

IMAGES = 4


def replica(name: str, ancestor: int) -> int | None:
    """Return the process of a server among the descendants of another process."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            names[int(path.name)] = (path / "cmdline").read_text()
        except OSError:
            continue
    for pid, line in names.items():
        above: int | None = pid
        while above is not None and above != ancestor:
            above = parents.get(above)
        if above is not None and f"coin:{name}" in line:
            return pid
    return None


def references(system: CodedSystem) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return some test images of every task, and the probabilities of its expert and of its stand-in for them."""
    width, found = system.experts.width, {}
    servers = [NetworkServer(path, width, system.decoder) for path in (*system.experts.paths.values(), *system.coded)]
    decodings = Decodings(system.code, system.fitted_decoders())
    for place, (task, data) in enumerate(system.data().tasks.items()):
        images = next(iter(data.test_dataloader()))[0]
        # The front end brings them to the networks' size, in whole numbers.
        size = system.experts.config.image_size
        seen = read_array(images.numpy().tobytes(), images.shape, size, InputLimits(samples=len(images)))
        arrived = {number: server(seen) for number, server in enumerate(servers) if number >= len(system.tasks)}
        decoded = decodings.decode(arrived, [place])[0][place].logits
        own, stand_in = (each[:, : data.num_classes].softmax(1) for each in (servers[place](seen).logits, decoded))
        found[task] = images, own, stand_in
    return found


def under_kills(client: httpx.Client, process: int, system: CodedSystem, seconds: float) -> bool:
    """Ask while experts are killed, print what came, and return whether all of it was right."""
    known, right = references(system), True
    print("killed    asked failed decoded agree  p50 ms  p99 ms")
    for killed in ((), system.tasks[:1], system.tasks):
        stop, counts, times = threading.Event(), Counter[str](), []

        def kill(names: tuple[str, ...] = killed, stop: threading.Event = stop) -> None:
            while not stop.wait(0.2):
                for name in names:
                    if (pid := replica(f"expert-{name}", process)) is not None:
                        os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        time.sleep(1.0)
        end = time.monotonic() + seconds
        for turn, task in enumerate(cycle(system.tasks)):
            if time.monotonic() > end:
                break
            images, own, stand_in = known[task]
            rows = torch.arange(turn * IMAGES, (turn + 1) * IMAGES) % len(images)
            tensor = {"name": "images", "datatype": "UINT8", "shape": list(images[rows].shape)}
            body = {"inputs": [{**tensor, "data": images[rows].flatten().tolist()}]}
            began = time.monotonic()
            found = client.post(f"/v2/models/{task}/infer", json=body)
            times.append(1e3 * (time.monotonic() - began))
            counts["asked"] += 1
            if found.status_code != 200:
                print(found.status_code, found.text[:200])
                counts["failed"] += 1
                continue
            said, answer = found.json()["parameters"], torch.tensor(found.json()["outputs"][0]["data"])
            wanted, by = (stand_in, "coded-") if said["decoded"] else (own, f"expert-{task}")
            exact = torch.allclose(answer.view(IMAGES, -1), wanted[rows], rtol=0, atol=1e-4)
            right = right and exact and said["answered_by"].startswith(by)
            counts["decoded"] += said["decoded"]
            counts["agree"] += int((answer.view(IMAGES, -1).argmax(1) == own[rows].argmax(1)).sum())
        stop.set()
        killer.join()
        right = right and not counts["failed"]
        asked, (p50, p99) = counts["asked"], np.percentile(times, [50, 99])
        agree = 100 * counts["agree"] / (IMAGES * max(asked - counts["failed"], 1))
        told = f"{asked:5d} {counts['failed']:6d} {counts['decoded']:7d} {agree:5.1f} {p50:7.1f} {p99:7.1f}"
        print(f"{len(killed)} of {len(system.tasks)}    {told}", flush=True)
    return right


def main() -> int:
    """Serve, kill, ask, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--method", default=None)
    parser.add_argument("--decoder", default="expert_head")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    system = read_coded_system(options.folder, Choice(options.method, None, options.decoder), alone=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chosen = [f"--method={system.method}", f"--batchnorm={system.batchnorm}", f"--decoder={system.decoder.name}"]
    command = [sys.executable, "-m", "coin", "serve", str(options.folder), "--policy=standin", *chosen]
    with tempfile.NamedTemporaryFile("w+") as said:
        process = subprocess.Popen([*command, f"--ray.port={port}"], stdout=said, stderr=said)
        try:
            while "serving " not in Path(said.name).read_text():
                if process.poll() is not None:
                    print(Path(said.name).read_text())
                    return 1
                time.sleep(0.5)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                right = under_kills(client, process.pid, system, options.seconds)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(100)
    bases = {path.parent / load_provenance(path).get("base_file", path.name) for path in system.coded}
    kept = {*system.coded, *bases, system.kept_decoders}
    disk, told = sum(path.stat().st_size for path in kept) / 2**20, float(system.results["memory_mib"].iloc[0])
    print(f"on disk {disk:.4f} MiB, memory_mib {told:.4f}: {100 * (disk / told - 1):+.2f} %")
    print(f"answers: {'all as they should be' if right else 'WRONG'}")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
