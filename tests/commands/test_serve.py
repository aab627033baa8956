"""``coin serve``: the system it makes of an experiment, its mistakes, and on Ray Serve, where that is installed."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coin.cli import main
from coin.commands.serve import read_system, read_tasks
from coin.commands.served import read_served
from coin.errors import ServingError
from coin.reporting import read_results
from coin.reporting.results import asked_policy
from coin.serving.client import Client
from coin.serving.front_end import FrontEnd
from coin.serving.model import NetworkServer
from coin.serving.ray_engine import System
from coin.serving.replies import Reply


def read(folder: Path, policy: str = "coded_hedged", decoder: str = "feature_ridge") -> System:
    return read_system(str(folder), "coin", "auto", decoder, policy, 0.9)


def front_end(system: System, lost: int) -> FrontEnd:
    """Return a front end with the networks in this process, one of which is lost."""

    def serve(place: int) -> Any:
        network = NetworkServer(system.paths[place], system.expects.outputs, system.decoder)

        async def ask(images: torch.Tensor) -> Reply:
            if place == lost:
                raise RuntimeError("killed")
            return network(images)

        return ask

    servers = [serve(place) for place in range(len(system.paths))]
    return FrontEnd(
        servers, system.layout, system.policy, system.expects, system.decodings, names=system.names
    )  # fmt: skip


@pytest.mark.parametrize("decoder", ["linear", "feature_ridge"])
def test_what_is_served_is_as_accurate_as_the_results_say(finished: Path, decoder: str) -> None:
    system = read(finished, decoder=decoder)
    assert system.names == ("expert-digits", "expert-letters", "coded-0")
    results = read_results(finished / "seed-0")
    results = results[
        (results.method == "coin") & (results.batchnorm.map(asked_policy) == "auto") & (results.decoder == decoder)
    ]
    tasks = read_tasks(read_served(finished, "coin", "auto", decoder)).tasks

    async def accuracy(task: str, expert: int, lost: int) -> float:
        right = count = 0
        async with front_end(system, lost) as front:
            for images, labels in tasks[task].test_dataloader():
                answer = await front.ask(images, expert)
                assert answer.decoded == (lost == expert)
                right += int((answer.logits[:, : tasks[task].num_classes].argmax(1) == labels).sum())
                count += len(labels)
        return right / count

    for expert, task in enumerate(tasks):
        (row,) = results[results.task == task].itertuples()
        assert asyncio.run(accuracy(task, expert, lost=1 - expert)) == pytest.approx(row.expert_accuracy)
        assert asyncio.run(accuracy(task, expert, lost=expert)) == pytest.approx(row.decoded_accuracy)


def test_without_coding_the_extra_server_is_a_copy(finished: Path) -> None:
    system = read(finished, "replicated")
    assert system.names == ("expert-digits", "expert-letters", "copy-0-digits")
    assert system.paths[2] == system.paths[0]


MISTAKES = {
    "no results": (["nowhere"], "nowhere"),
    "decoder": (["FOLDER", "--decoder=magic"], "results of linear, ridge, feature_ridge"),
    "policy": (["FOLDER", "--policy=magic"], "magic"),
    "port": (["FOLDER", "--ray.port=0"], "port 0"),
    "limit": (["FOLDER", "--ray.limits.queue=0"], "queue=0"),
    "input limit": (["FOLDER", "--ray.inputs.bytes=0"], "bytes=0"),
    "threads": (["FOLDER", "--ray.resources.threads=0"], "at least one thread"),
    "slow server": (["FOLDER", "--ray.faults.slow={expert-9: 2.0}"], "expected one of expert-digits, expert-letters"),
    "no Ray": (["FOLDER"], "pip install 'coded-coin[serve]'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line(
    case: str, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as though it were not installed
    arguments, wanted = MISTAKES[case]
    assert main(["serve", *(argument.replace("FOLDER", str(finished)) for argument in arguments)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("coin: error: ")
    assert wanted in line


@pytest.fixture
def on_ray(finished: Path, tmp_path: Path) -> Iterator[tuple[Client, subprocess.Popen[bytes]]]:
    """A client of ``coin serve``, and its process."""
    pytest.importorskip("ray", reason="Ray Serve is not installed: pip install 'coded-coin[serve]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "coin", "serve", str(finished), f"--ray.port={port}", "--decoder=ridge"],
            stdout=said, stderr=said, env=environment,
        )  # fmt: skip
        client = Client(f"http://127.0.0.1:{port}")
        try:
            end = time.monotonic() + 400
            while not said_so(tmp_path / "said"):
                assert process.poll() is None, (tmp_path / "said").read_text()
                assert time.monotonic() < end
                time.sleep(0.5)
            yield client, process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=100)


def said_so(path: Path) -> bool:
    return "serving digits, letters at" in path.read_text()


def replica(name: str, ancestor: int) -> int:
    """Return the process of a server among the descendants of another process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    for pid in parents:
        above: int | None = pid
        while above is not None and above != ancestor:
            above = parents.get(above)
        if above is not None and f"coin:{name}" in Path(f"/proc/{pid}/cmdline").read_text():
            return pid
    raise AssertionError(f"there is no process of {name}")


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="it finds the server's process in /proc")
def test_ray_serves_and_a_killed_expert_is_decoded(
    on_ray: tuple[Client, subprocess.Popen[bytes]], finished: Path
) -> None:
    client, process = on_ray
    images = np.random.default_rng(0).integers(256, size=(3, 3, 16, 16), dtype=np.uint8)
    assert client.tasks()["servers"] == ["expert-digits", "expert-letters", "coded-0"]
    own = client.ask("digits", images)
    if not own.decoded:  # Ray's first call takes its time
        alone = NetworkServer(finished / "seed-0/experts/digits/expert.safetensors", 10, read(finished).decoder)
        expected = alone(torch.tensor(images)).logits.softmax(1)
        found = torch.tensor([prediction.probabilities for prediction in own.predictions])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert own.answered_by == ("expert-digits",)
    assert len(client.ask_all(images[0])) == 2
    os.kill(replica("expert-digits", process.pid), signal.SIGKILL)
    decoded = [client.ask("digits", images) for _ in range(3)]
    assert all(answer.decoded for answer in decoded)
    assert all(answer.answered_by == ("expert-letters", "coded-0") for answer in decoded)
    letters = client.ask("letters", images)
    assert {letters.task, len(letters.predictions)} == {"letters", 3}
    with pytest.raises(ServingError, match="expected one of digits, letters"):
        client.ask("magic", images)
    assert client.health()["queries"]["decoded"] >= 3
