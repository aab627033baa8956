"""Kill experts' processes under clients of ``coin serve --policy=standin``, load it, and send it what is wrong.

    python tests/benchmarks/standins.py runs/smallest --method=refit --decoder=expert_head --queries 1000 --clients 400

While no expert, each in turn and all of them are killed (``kill -9``, again as soon as Ray has started another), a
client asks for every task in turn, with images. Every answer must be that of the expert or of the coded model alone
with the decoder, as they answer here, and name the server. A table says for each phase how many answers there were, how
many were decoded, of how many the class is that of the expert itself, failures, and milliseconds. Then so many clients
ask at once for ten seconds, and wrong queries are sent. The exit status is 1 where an answer is another, there is none
while experts are killed, a status under load is none of 200, 429, 503 and 504, or a wrong query's is no 4xx.
"""

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import cycle, islice
from pathlib import Path

import httpx
import numpy as np
import torch

from coin.commands.serve import read_system
from coin.serving.policies import PolicyKind
from coin.serving.servers import System

IMAGES = 4
Known = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


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


def references(system: System, tasks: list[str], size: int) -> Known:
    """Return some images for every task, and the probabilities of its expert and of its stand-in for them."""
    servers, found = {name: system.network(name) for name in system.files}, {}
    for place, task in enumerate(tasks):
        images = torch.randint(
            256, (64, 3, size, size), generator=torch.Generator().manual_seed(place), dtype=torch.uint8
        )
        replies = {name: servers[name](images) for name in system.stand_ins.of[place]}
        both = servers[system.stand_ins.experts[place]](images), system.decode(place, replies)
        found[task] = (images, *(each.logits[:, : system.classes[place]].softmax(1) for each in both))
    return found


def query(images: torch.Tensor) -> dict[str, object]:
    """Return a query for these images."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape), "data": images.flatten().tolist()}
    return {"inputs": [tensor], "outputs": []}


def under_kills(client: httpx.Client, process: int, known: Known, queries: int) -> bool:
    """Ask while experts are killed, print what came, and return whether all of it was right."""
    right, tasks = True, list(known)
    print(f"{'killed':20s} asked failed decoded agree  p50 ms  p99 ms")
    phases = [[], *([task] for task in tasks), tasks]
    for killed in phases:
        stop, counts, times = threading.Event(), Counter[str](), []

        def kill(killed: list[str] = killed, stop: threading.Event = stop, counts: Counter[str] = counts) -> None:
            while not stop.is_set():
                for task in killed:
                    if (pid := replica(f"expert-{task}", process)) is not None:
                        os.kill(pid, signal.SIGKILL)
                        counts["kills"] += 1
                stop.wait(0.2)

        killer = threading.Thread(target=kill)
        killer.start()
        for turn, task in enumerate(islice(cycle(tasks), queries // len(phases))):
            images, own, stand_in = known[task]
            rows = torch.arange(turn * IMAGES, (turn + 1) * IMAGES) % len(images)
            began = time.monotonic()
            found = client.post(f"/v2/models/{task}/infer", json=query(images[rows]))
            times.append(1e3 * (time.monotonic() - began))
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
        right = right and not counts["failed"] and (not killed or counts["kills"] > 0)
        agree, (p50, p99) = 100 * counts["agree"] / (IMAGES * len(times)), np.percentile(times, [50, 99])
        told = f"{len(times):5d} {counts['failed']:6d} {counts['decoded']:7d} {agree:5.1f} {p50:7.1f} {p99:7.1f}"
        print(f"{' '.join(killed) or 'nobody':20s} {told}  ({counts['kills']} kills)", flush=True)
    return right


async def under_load(base: str, known: Known, clients: int, seconds: float) -> bool:
    """Let so many clients ask at once, print statuses and latencies, and return whether all are as they should be."""
    counts, times, end = Counter[int](), list[float](), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=base, timeout=60, limits=limits) as client:

        async def ask(number: int) -> None:
            task = list(known)[number % len(known)]
            body = query(known[task][0][:1])
            while time.monotonic() < end:
                began = time.monotonic()
                found = await client.post(f"/v2/models/{task}/infer", json=body)
                counts[found.status_code] += 1
                if found.status_code == 200:
                    times.append(1e3 * (time.monotonic() - began))
                else:
                    await asyncio.sleep(float(found.headers.get("retry-after", 1)))

        await asyncio.gather(*map(ask, range(clients)))
    p50, p99 = np.percentile(times or [np.nan], [50, 99])
    print(f"{clients} clients for {seconds:.0f} s: {dict(counts)}, answers after {p50:.0f} (p50), {p99:.0f} ms (p99)")
    return bool(times) and set(counts) <= {200, 429, 503, 504}


def wrong_queries(client: httpx.Client, task: str, size: int) -> bool:
    """Send wrong queries, print their statuses, and return whether each is a 4xx that says what is wrong."""
    good = query(torch.zeros(1, 3, size, size, dtype=torch.uint8))

    def changed(**changes: object) -> dict[str, object]:
        return {"json": {"inputs": [{**good["inputs"][0], **changes}]}}  # type: ignore[index]

    cases: dict[str, dict[str, object]] = {
        "no JSON": {"content": b"{"}, "nothing": {"json": {}}, "input": changed(name="pictures"),
        "datatype": changed(datatype="FP32"), "shape": changed(shape=[3, size, size]), "few": changed(data=[1, 2]),
        "values": changed(data=[300] * 3 * size * size), "no base64": changed(datatype="BYTES", shape=[1], data=["%"]),
        "no image": changed(datatype="BYTES", shape=[1], data=["aGVsbG8="]), "many": changed(shape=[65, 3, 1, 1]),
        "output": {"json": {**good, "outputs": [{"name": "magic"}]}}, "large": {"content": bytes(9 * 2**20)},
        "gzip": {"content": b"x", "headers": {"content-encoding": "gzip"}},
        "binary": {"content": b"x", "headers": {"inference-header-content-length": "1"}},
    }  # fmt: skip
    found = {name: client.post(f"/v2/models/{task}/infer", **case) for name, case in cases.items()}  # type: ignore[arg-type]
    found["model"] = client.post("/v2/models/magic/infer", json=good)
    for name, each in found.items():
        print(f"{name:10s} {each.status_code} {each.text[:110]}")
    return all(400 <= each.status_code < 500 and each.json()["error"] for each in found.values())


def main() -> int:
    """Serve, kill, ask, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--method", default=None)
    parser.add_argument("--decoder", default="expert_head")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=400)
    options = parser.parse_args()
    chosen = str(options.folder), options.method, options.decoder, PolicyKind("standin")
    system, about = read_system(*chosen, 0.9)
    known = references(system, list(about.classes), about.image_size)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "coin", "serve", chosen[0], "--policy=standin", f"--decoder={options.decoder}"]
    command += [f"--ray.port={port}", *([f"--method={options.method}"] if options.method else [])]
    with tempfile.NamedTemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            while "serving " not in Path(said.name).read_text():
                if process.poll() is not None:
                    print(Path(said.name).read_text())
                    return 1
                time.sleep(0.5)
            base = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=base, timeout=30) as client:
                right = under_kills(client, process.pid, known, options.queries)
                right &= wrong_queries(client, next(iter(known)), about.image_size)
            right &= asyncio.run(under_load(base, known, options.clients, 10.0))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(100)
    print("all as it should be" if right else "WRONG")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
