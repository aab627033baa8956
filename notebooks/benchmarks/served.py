"""What `failover.py` needs of a served run: its processes, its test images with the expected answers, and clients."""

import asyncio
import base64
import io
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from coin.files.yaml import read_yaml
from coin.reporting.summary import seed_folders
from coin.serving.protocol import read_images
from coin.serving.servers import Reply
from coin.serving.system import System

MOST_QUERIES = 5000  # of one phase
MOST_OPEN = 200  # queries that wait at a time; the next ones count as failed
TOLERANCE = 1e-3  # of probabilities: a pass over several images rounds otherwise than one over each


def private_mib(process: psutil.Process) -> float:
    """Return the memory of a process that it shares with no other, in MiB."""
    return float(process.memory_full_info().uss / 2**20)


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """A `coin serve` with options, as a subprocess; a context."""

    def __init__(self, options: Sequence[str]) -> None:
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "coin", "serve", *options, f"--ray.port={self.port}"]

    def __enter__(self) -> "Served":
        said = Path(tempfile.mkstemp(suffix=".log")[1])
        with said.open("w") as file:
            self._process = subprocess.Popen(self._command, stdout=file, stderr=file)
        while "serving " not in said.read_text():
            if self._process.poll() is not None:
                raise RuntimeError(f"{' '.join(self._command)} has ended:\n{said.read_text()}")
            time.sleep(0.5)
        said.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(100)

    def processes(self) -> list[tuple[psutil.Process, str]]:
        """Return the servers' processes with their names; while one starts, its name ends in ``.__init__``."""
        found = []
        for process in self._descendants():
            with suppress(psutil.Error):  # it has ended
                title = " ".join(process.cmdline()).strip()
                if match := re.fullmatch(
                    r"ray::.*ServeReplica:coin:(.+?)(\.__init__|\.\w+)?", title
                ):
                    is_starting = match[2] == ".__init__"
                    found.append((process, match[1] + (".__init__" if is_starting else "")))
        return found

    def named(self, servers: Sequence[str]) -> list[psutil.Process]:
        """Return the processes of servers that have started."""
        return [process for process, name in self.processes() if name in servers]

    def _descendants(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)

    def is_quiet(self) -> bool:
        """Return whether nothing is computed for a second, as while a server starts.

        That takes a whole processor; a process of Ray's that waits takes a hundredth of one.
        """
        used = []
        for _ in range(2):
            time.sleep(1.0)
            processes = self._descendants()
            used.append(0.0)
            for process in processes:
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    used[-1] += times.user + times.system
        return used[1] - used[0] < 0.2 + 0.02 * len(processes)

    def recover(self, servers: Sequence[str], known: "Known") -> None:
        """Wait until all servers run, answer for themselves and are quiet; RuntimeError after three minutes."""
        end = time.monotonic() + 180
        with httpx.Client(base_url=self.base, timeout=30) as client:
            while time.monotonic() < end:
                if (
                    len(self.named(servers)) == len(servers)
                    and self.is_quiet()
                    and self._is_well(client, known)
                ):
                    return
                time.sleep(0.5)
        raise RuntimeError(f"not all of {', '.join(servers)} run again after three minutes")

    def _is_well(self, client: httpx.Client, known: "Known") -> bool:
        """Return whether every expert has given its own answer, and no server is doubted any more.

        Of many experts one or another is late by chance, and its answer is decoded.
        """
        answered = set()
        for _ in range(20):
            for task, place in known.places.items():
                found = client.post(f"/v2/models/{task}/infer", json=known.query(place, [0]))
                if found.status_code == 200 and not found.json()["parameters"]["decoded"]:
                    answered.add(task)
            ups = re.findall(r"coin_server_up\{.*\} (\S+)", client.get("/metrics").text)
            if len(answered) == len(known.places) and all(float(up) == 1 for up in ups):
                return True
        return False


class Outage:
    """Keeps servers down from its start to its end: a context.

    Their processes are killed, or with `is_stop` stopped. What Ray starts in place of a killed one is stopped as soon
    as it has its name: a machine that stays down. Killed again, it would be started again and again, which takes the
    processor from those that are measured. At the end all that is stopped goes on.
    """

    def __init__(self, served: Served, servers: Sequence[str], is_stop: bool = False) -> None:
        self._served, self._servers, self._is_stop = served, servers, is_stop
        self._stopped: set[psutil.Process] = set()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> "Outage":
        down = self._served.named(self._servers)
        if len(down) != len(self._servers):
            raise RuntimeError(
                f"found {len(down)} processes of {', '.join(self._servers)}, expected one each"
            )
        self.began = time.monotonic()
        for process in down:
            process.send_signal(signal.SIGSTOP if self._is_stop else signal.SIGKILL)
        if self._is_stop:
            self._stopped.update(down)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            for process, name in self._served.processes():
                if name.removesuffix(".__init__") in self._servers and process not in self._stopped:
                    with suppress(psutil.Error):  # one of those that were killed
                        process.suspend()
                        self._stopped.add(process)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        for process in self._stopped:
            with suppress(psutil.Error):
                process.resume()


class Slowdown:
    """Lets a server's process run for a share of the time alone, by SIGSTOP and SIGCONT: a context."""

    def __init__(
        self, served: Served, server: str, share: float = 0.2, period: float = 0.01
    ) -> None:
        (self._process,) = served.named([server])
        self._share, self._period = share, period  # in seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._alternate)

    def __enter__(self) -> "Slowdown":
        self.began = time.monotonic()
        self._thread.start()
        return self

    def _alternate(self) -> None:
        while not self._ended.is_set():
            self._process.suspend()
            time.sleep((1 - self._share) * self._period)
            self._process.resume()
            time.sleep(self._share * self._period)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


class Known:
    """Test images of every task with their labels, and the replies of all servers that may answer for the task."""

    def __init__(self, folder: Path, system: System, count: int) -> None:
        self.system = system
        tasks = read_yaml(seed_folders(folder)[0] / "config.yaml")["tasks"]
        network_of = system.reader()
        stand_ins = system.stand_ins
        self.places = {
            name.removeprefix("expert-"): place
            for place, name in enumerate(system.stand_ins.experts)
        }
        self.labels: list[Tensor] = []
        self._files: list[list[str]] = []
        self._replies: list[dict[str, Reply]] = []
        for task, place in self.places.items():
            stored, labels = test_images(tasks[task], count)
            files = [as_png(image) for image in stored]
            images = read_images(files, system.image_size)  # as the front end has them
            self.labels.append(labels)
            self._files.append([base64.b64encode(file).decode() for file in files])
            replies = {}
            for name in (stand_ins.experts[place], *stand_ins.of[place]):
                asked_as = stand_ins.asked_as(name, place)
                replies[name] = network_of(system.files[name][asked_as])(images, asked_as)
            self._replies.append(replies)

    def query(self, place: int, rows: Sequence[int]) -> dict[str, Any]:
        """Return a query for some of a task's images."""
        data = [self._files[place][row] for row in rows]
        images = {"name": "images", "datatype": "BYTES", "shape": [len(rows)], "data": data}
        return {"inputs": [images], "outputs": [{"name": "probabilities"}]}

    def check(self, answer: "Answered") -> None:
        """Set whether an answer is what these servers give, and which of its classes are the labels."""
        if answer.status != 200:
            return
        own = self._replies[answer.place]
        names = str(answer.parameters["answered_by"]).split(",")
        if not {*names} <= own.keys():
            return
        replies = {
            name: Reply(own[name].logits[answer.rows], own[name].features[answer.rows])
            for name in names
        }
        if answer.parameters["decoded"]:
            logits = self.system.decode(answer.place, replies).logits
        else:
            logits = replies[names[0]].logits
        classes = list(self.system.classes.values())[answer.place]
        expected = logits[:, : len(classes)].softmax(1)
        found = torch.tensor(answer.probabilities).view(expected.shape)
        answer.is_exact = torch.allclose(found, expected.float(), rtol=0, atol=TOLERANCE)
        answer.right = int((found.argmax(1) == self.labels[answer.place][answer.rows]).sum())


def test_images(section: dict[str, Any], count: int) -> tuple[Tensor, Tensor]:
    """Return so many of a task's test images, drawn at random, as they are stored, and their labels."""
    module, _, name = section["class_path"].rpartition(".")
    task = getattr(import_module(module), name)(**section["init_args"])
    task.prepare_data()
    task.setup("test")
    batches = list(task.test_dataloader())
    images = torch.cat([batch[0] for batch in batches])
    labels = torch.cat([batch[1] for batch in batches])
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return images[drawn], labels[drawn]


def as_png(image: Tensor) -> bytes:
    """Return an image, uint8 ``[1 or 3, H, W]``, as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(eq=False)
class Answered:
    """A query and its end; times are of `time.monotonic`."""

    place: int
    rows: list[int]
    sent: float
    ended: float = 0.0
    status: int = 0  # of HTTP; 0 where the query was not sent, or the connection broke
    parameters: dict[str, Any] = field(default_factory=dict)
    probabilities: list[float] = field(default_factory=list)
    is_exact: bool = False
    right: int = 0

    @property
    def seconds(self) -> float:
        """How long it took; infinity where there is no answer."""
        return self.ended - self.sent if self.status == 200 else float("inf")


class Client:
    """A client of a served run; a context."""

    def __init__(self, served: Served, known: Known) -> None:
        self.known, self._tasks = known, list(known.places)
        limits = httpx.Limits(max_connections=MOST_OPEN, max_keepalive_connections=MOST_OPEN)
        self._http = httpx.AsyncClient(base_url=served.base, timeout=20, limits=limits)
        self._open = 0

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, place: int, rows: Sequence[int]) -> Answered:
        """Ask for a task's answer to some of its images."""
        query = self.known.query(place, rows)
        answer = Answered(place, list(rows), time.monotonic())
        if self._open < MOST_OPEN:
            self._open += 1
            try:
                found = await self._http.post(f"/v2/models/{self._tasks[place]}/infer", json=query)
                answer.status = found.status_code
                if found.status_code == 200:
                    answer.parameters = found.json()["parameters"]
                    answer.probabilities = found.json()["outputs"][0]["data"]
            except httpx.HTTPError:
                answer.status = 0
            self._open -= 1
        answer.ended = time.monotonic()
        return answer

    async def load(self, rate: float, seconds: float, seed: int) -> list[Answered]:
        """Ask for one image at a time, by a Poisson process of so many queries a second; return when all have ended."""
        draw = np.random.default_rng(seed)
        running: list[asyncio.Task[Answered]] = []
        begin = due = time.monotonic()
        while len(running) < MOST_QUERIES:
            due += draw.exponential(1 / rate)
            if due > begin + seconds:
                break
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            place = int(draw.integers(len(self._tasks)))
            row = int(draw.integers(len(self.known.labels[place])))
            running.append(asyncio.create_task(self.ask(place, [row])))
        return list(await asyncio.gather(*running))

    async def capacity(self, clients: int, seconds: float) -> float:
        """Return how many answers a second so many clients get that ask again as soon as they are answered."""
        end = time.monotonic() + seconds

        async def ask_on(number: int) -> int:
            answers = 0
            while time.monotonic() < end:
                place = (number + answers) % len(self._tasks)
                answer = await self.ask(place, [answers % len(self.known.labels[place])])
                answers += answer.status == 200
            return answers

        each = await asyncio.gather(*map(ask_on, range(clients)))
        return sum(each) / seconds

    async def every_image(self, size: int = 8, clients: int = 2) -> list[Answered]:
        """Ask for every image of every task once."""
        turns = asyncio.Semaphore(clients)

        async def in_turn(place: int, rows: Sequence[int]) -> Answered:
            async with turns:
                return await self.ask(place, rows)

        running = []
        for place, labels in enumerate(self.known.labels):
            starts = range(0, len(labels), size)
            running += [
                in_turn(place, range(start, min(start + size, len(labels)))) for start in starts
            ]
        return list(await asyncio.gather(*running))


async def crowd(served: Served, known: Known, clients: int, seconds: float = 10.0) -> bool:
    """Let so many clients ask at once, print what came, and return whether it is answers and refusals alone."""
    counts, times = Counter[int](), list[float]()
    end = time.monotonic() + seconds
    tasks = list(known.places)
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=served.base, timeout=60, limits=limits) as http:

        async def ask_on(number: int) -> None:
            place = number % len(tasks)
            query = known.query(place, [0])
            while time.monotonic() < end:
                began = time.monotonic()
                found = await http.post(f"/v2/models/{tasks[place]}/infer", json=query)
                counts[found.status_code] += 1
                if found.status_code == 200:
                    times.append(1e3 * (time.monotonic() - began))
                else:
                    await asyncio.sleep(float(found.headers.get("retry-after", 1)))

        await asyncio.gather(*map(ask_on, range(clients)))
    p50, p99 = np.percentile(times or [np.nan], [50, 99])
    print(
        f"{clients} clients for {seconds:.0f} s: {dict(counts)}, answers after {p50:.0f} (p50), {p99:.0f} ms (p99)"
    )
    return bool(times) and set(counts) <= {200, 429, 503, 504}


def wrong_queries(served: Served, known: Known) -> bool:
    """Send wrong queries, print their statuses, and return whether each is a 4xx that says what is wrong."""
    task = next(iter(known.places))
    good = known.query(0, [0])
    (images,) = good["inputs"]
    cases: dict[str, dict[str, Any]] = {
        "no JSON": {"content": b"{"},
        "no image": {"json": {"inputs": [images | {"data": ["aGVsbG8="]}]}},
        "many": {"json": {"inputs": [images | {"shape": [65], "data": 65 * images["data"]}]}},
        "output": {"json": good | {"outputs": [{"name": "magic"}]}},
        "large": {"content": bytes(9 * 2**20)},
    }
    with httpx.Client(base_url=served.base, timeout=30) as client:
        found = {
            name: client.post(f"/v2/models/{task}/infer", **case) for name, case in cases.items()
        }
        found["model"] = client.post("/v2/models/magic/infer", json=good)
    for name, each in found.items():
        print(f"{name:10s} {each.status_code} {each.text[:110]}")
    return all(400 <= each.status_code < 500 and each.json()["error"] for each in found.values())
