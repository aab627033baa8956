"""``coin serve``: the system it makes of an experiment, its mistakes, and on Ray Serve, where that is installed."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml

from coin.cli import main
from coin.commands.coded_system import Choice, CodedSystem, read_coded_system
from coin.commands.serve import application, read_system
from coin.errors import CoinWarning, ConfigurationError, FileError
from coin.files.safetensors import load_provenance, load_state
from coin.reporting import read_results
from coin.reporting.extras import write_promises
from coin.reporting.results import requested_policy
from coin.serving.front_end import FrontEnd
from coin.serving.limits import Limits
from coin.serving.model import NetworkServer
from coin.serving.policies import PolicyKind
from coin.serving.ray_app import System
from coin.serving.replies import Reply
from tests.serving.conftest import ask_all, ask_one


def read(folder: Path, policy: str | None = None, decoder: str | None = "feature_ridge") -> System:
    return read_system(str(folder), Choice("coin", "auto", decoder), policy and PolicyKind(policy), 0.9)


@pytest.fixture(scope="session")
def alone(finished: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished experiment, evaluated with decoders that read no survivor beside one that does."""
    copy = shutil.copytree(finished, tmp_path_factory.mktemp("alone") / "tiny")
    decoders = "[linear, expert_head, {kind: feature_ridge, survivors: false}]"
    methods = "[{class_path: Coin, init_args: {compress: {bits: 8}}}]"
    options = [f"--output={copy.parent}", f"--decoders={decoders}", f"--methods={methods}"]
    assert main(["run", "-c", str(config), *options]) == 0
    return copy


def front_end(system: System, *lost: int) -> FrontEnd:
    """Return a front end with the networks in this process, some of which are lost."""

    def serve(name: str, path: str, is_lost: bool) -> Any:
        network = NetworkServer(Path(system.folder) / path, system.expects.outputs, system.decoder)

        async def ask(images: torch.Tensor) -> Reply:
            if is_lost:
                raise RuntimeError("killed")
            return network(images)

        return ask

    files = {name: path for networks in system.processes.values() for name, path in networks.items()}
    servers = {name: serve(name, path, place in lost) for place, (name, path) in enumerate(files.items())}
    return system.front_end(servers, Limits())


@pytest.mark.parametrize("decoder", ["linear", "feature_ridge"])
def test_what_is_served_is_as_accurate_as_the_results_say(finished: Path, decoder: str) -> None:
    system = read(finished, decoder=decoder)
    assert list(system.processes) == ["expert-digits", "expert-letters", "coded-0"]
    results = read_results(finished / "seed-0")
    results = results[
        (results.method == "coin") & (results.batchnorm.map(requested_policy) == "auto") & (results.decoder == decoder)
    ]
    tasks = read_coded_system(finished, Choice("coin", "auto", decoder)).data().tasks

    async def accuracy(task: str, expert: int, lost: int) -> float:
        right = count = 0
        async with front_end(system, lost) as front:
            for images, labels in tasks[task].test_dataloader():
                answer = await ask_one(front, images, expert)
                assert answer.decoded == (lost == expert)
                assert len(answer.risk) == len(labels)
                assert 0 <= float(answer.risk.min()) <= float(answer.risk.max()) <= 1
                assert bool(answer.risk.any()) == answer.decoded
                right += int((answer.logits[:, : tasks[task].num_classes].argmax(1) == labels).sum())
                count += len(labels)
        return right / count

    for expert, task in enumerate(tasks):
        (row,) = results[results.task == task].itertuples()
        assert asyncio.run(accuracy(task, expert, lost=1 - expert)) == pytest.approx(row.expert_accuracy)
        assert asyncio.run(accuracy(task, expert, lost=expert)) == pytest.approx(row.decoded_accuracy)


@pytest.mark.parametrize(
    ("method", "decoder"), [("coin", "expert_head"), ("coin", "feature_ridge-alone"), ("coin-8bit", "expert_head")]
)
@pytest.mark.slow
def test_a_coded_model_alone_stands_in_for_every_expert_that_is_lost(alone: Path, method: str, decoder: str) -> None:
    choice = Choice(method, "auto", decoder)
    system = read_system(str(alone), choice, None, 0.9)
    assert system.policy.kind is PolicyKind.standin
    (seed,) = alone.glob("seed-*")
    coded = read_coded_system(alone, choice)
    bases = {path.parent / load_provenance(path).get("base_file", path.name) for path in coded.coded}
    kept = {*coded.coded, *bases, coded.kept_decoders}
    results = read_results(seed)
    results = results[(results.method == method) & (results.batchnorm.map(requested_policy) == "auto")]
    results = results[results.decoder == decoder]
    tensors = [tensor.nbytes for path in kept for name, tensor in load_state(path)[0].items() if "moments" not in name]
    assert sum(tensors) / 2**20 == pytest.approx(results.memory_mib.iloc[0], rel=0.01)
    tasks = coded.data().tasks

    async def accuracies(policy: str | None, lost: tuple[int, ...]) -> list[float]:
        found = []
        asks = policy and PolicyKind(policy)
        async with front_end(read_system(str(alone), choice, asks, 0.9), *lost) as front:
            for expert, task in enumerate(tasks.values()):
                right = count = 0
                for images, labels in task.test_dataloader():
                    answer = await ask_one(front, images, expert)
                    assert answer.decoded == (expert in lost)
                    if policy is None:
                        assert answer.answered_by == (("coded-0",) if answer.decoded else (front.queues[expert].name,))
                    assert 0 <= float(answer.risk.min()) <= float(answer.risk.max()) <= 1
                    right += int((answer.logits[:, : task.num_classes].argmax(1) == labels).sum())
                    count += len(labels)
                found.append(right / count)
        return found

    for policy, lost in ((None, ()), (None, (1,)), (None, (0, 1)), ("coded_hedged", (0, 1)), ("coded_proactive", (0,))):
        wanted = [
            row.decoded_accuracy if expert in lost else row.expert_accuracy
            for expert, row in enumerate(results.set_index("task").loc[list(tasks)].itertuples())
        ]
        assert asyncio.run(accuracies(policy, lost)) == pytest.approx(wanted)


def test_standin_takes_the_most_accurate_decoder_that_reads_no_survivor(alone: Path, finished: Path) -> None:
    results = read_results(alone / "seed-0")
    means = results[results.method == "coin"].groupby(["decoder", "batchnorm"]).decoded_accuracy.mean()
    best = means.drop("linear").groupby("decoder").max().idxmax()
    system = read_system(str(alone), Choice("coin"), PolicyKind.standin, 0.9)
    assert system.description.platform == f"coin (standin, coin, {best})"
    with pytest.raises(ConfigurationError, match=r"'linear', .* has results of expert_head, feature_ridge-alone whose"):
        read(alone, "standin", "linear")
    with pytest.raises(ConfigurationError, match=r"no coded models whose decoder reads no survivor; add expert_head"):
        read(finished, "standin", None)


def test_what_a_run_promises_is_told_beside_the_risk(alone: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(alone, tmp_path / "copy")
    (seed,) = copy.glob("seed-*")
    rows = read_results(seed).query("decoder == 'expert_head' and method in ('coin', 'coin-8bit')")
    rows = rows.assign(alpha=0.02, confidence=0.95, samples=9, needed=9, threshold=9.0, promised=1, coverage=1, found=0)
    coin = (rows.method == "coin") & (rows.batchnorm.map(requested_policy) == "auto")
    rows.loc[coin, "threshold"] = [0.5 if task == "digits" else np.nan for task in rows[coin].task]
    write_promises(seed, rows)
    system = read(copy, decoder="expert_head")
    assert system.description.promise == {"alpha": 0.02, "confidence": 0.95}
    assert read(copy, decoder="feature_ridge-alone").description.promise is None
    images = torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    async def answers(*lost: int) -> Any:
        async with front_end(system, *lost) as front:
            return await ask_all(front, images)

    for lost in ((), (0,), (0, 1)):
        for answer, threshold in zip(asyncio.run(answers(*lost)), (0.5, -1.0), strict=True):
            assert torch.equal(answer.accepted, answer.risk <= threshold if answer.decoded else torch.ones(8) == 1)


def test_decoders_are_fitted_once_and_kept_with_what_they_were_fitted_from(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("decoders"))
    fits: list[str] = []
    fit = CodedSystem._fit_decoders
    monkeypatch.setattr(CodedSystem, "_fit_decoders", lambda self: fits.append(self.decoder.name) or fit(self))
    first = read(copy).decodings
    (kept,) = (copy / "seed-0" / "decoders").iterdir()
    again = read(copy).decodings
    assert fits == ["feature_ridge"]
    for erased, decoder in first.fitted.items():
        (own,), (other,) = decoder.fitted, again.fitted[erased].fitted
        assert torch.equal(own.coefficients, other.coefficients)
        assert torch.equal(decoder.errors, again.fitted[erased].errors)
    damaged = bytearray(kept.read_bytes())
    damaged[-20] ^= 1
    kept.write_bytes(damaged)
    read(copy)
    read(copy)
    assert len(fits) == 2
    config = copy / "seed-0" / "config.yaml"
    given = yaml.safe_load(config.read_text())
    given["calibration"]["samples_per_task"] -= 1
    config.write_text(yaml.safe_dump(given))
    read(copy)
    assert len(fits) == 3  # of other samples
    read(copy, decoder="linear")
    assert fits[3:] == ["linear"]


def test_a_replica_holds_every_expert_and_answers_like_them(finished: Path) -> None:
    system = read(finished, "hedged")
    assert list(system.processes) == ["expert-digits", "expert-letters", "replica-0"]
    own = [path for process in ("expert-digits", "expert-letters") for path in system.processes[process].values()]
    assert system.processes["replica-0"] == dict(zip(("replica-0-digits", "replica-0-letters"), own, strict=True))
    assert system.layout.copies == (0, 1)
    assert list(read(finished, "uncoded").processes) == ["expert-digits", "expert-letters"]
    images = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    async def answers(lost: int) -> Any:
        async with front_end(system, lost) as front:
            return await ask_one(front, images, 0)

    own, replica = asyncio.run(answers(1)), asyncio.run(answers(0))
    assert (replica.decoded, replica.answered_by) == (False, ("replica-0-digits",))
    torch.testing.assert_close(own.logits, replica.logits)


def test_a_serve_yaml_builds_the_application(finished: Path) -> None:
    pytest.importorskip("ray", reason="Ray Serve is not installed: pip install '.[serve]'")
    text = (Path(__file__).parents[2] / "configs/serve/three-machines.yaml").read_text()
    (app,) = yaml.safe_load(text)["applications"]
    assert app["import_path"] == "coin.commands.serve:application"
    assert application({**app["args"], "folder": str(finished), "method": "coin"}) is not None
    with pytest.raises(FileError, match="nowhere"):
        application({"folder": "nowhere"})


MISTAKES = {
    "no results": (["nowhere"], "nowhere"),
    "decoder": (["FOLDER", "--decoder=magic"], "results of linear, ridge, feature_ridge"),
    "policy": (["FOLDER", "--policy=magic"], "magic"),
    "port": (["FOLDER", "--ray.port=0"], "port=0"),
    "limit": (["FOLDER", "--ray.limits.queue=0"], "queue=0"),
    "input limit": (["FOLDER", "--ray.inputs.bytes=0"], "bytes=0"),
    "threads": (["FOLDER", "--ray.resources.threads=0"], "threads=0"),
    "no Ray": (["FOLDER"], "pip install '.[serve]'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line(
    case: str, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as though it were not installed
    if case != "no Ray":
        monkeypatch.setattr("coin.commands.early._PACKAGES", {})
    arguments, wanted = MISTAKES[case]
    assert main(["serve", *(argument.replace("FOLDER", str(finished)) for argument in arguments)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("coin: error: ")
    assert wanted in line


def test_a_port_that_is_taken_is_refused_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coin.commands.early._PACKAGES", {})  # Ray need not be here
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Ray's proxies do
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", ".", f"--ray.port={port}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"coin: error: cannot listen at 127.0.0.1:{port} (")
    assert main(["serve", "nowhere", f"--ray.port={port}"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.fixture
def on_ray(finished: Path, tmp_path: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """A client of ``coin serve``, and its process."""
    pytest.importorskip("ray", reason="Ray Serve is not installed: pip install '.[serve]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "coin", "serve", str(finished), f"--ray.port={port}", "--decoder=ridge"],
            stdout=said, stderr=said, env=environment,
        )  # fmt: skip
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
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
    on_ray: tuple[httpx.Client, subprocess.Popen[bytes]], finished: Path, tmp_path: Path
) -> None:
    client, process = on_ray
    images = np.random.default_rng(0).integers(256, size=(3, 3, 16, 16), dtype=np.uint8)
    body = {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [3, 3, 16, 16], "data": images.tolist()}]}

    def ask(model: str) -> tuple[bool, str, list[float]]:
        found = client.post(f"/v2/models/{model}/infer", json=body)
        assert found.status_code == 200, found.text
        said = found.json()["parameters"]
        return said["decoded"], said["answered_by"], found.json()["outputs"][0]["data"]

    assert list(client.get("/health").json()["servers"]) == ["expert-digits", "expert-letters", "coded-0"]
    assert client.get("/v2/health/ready").status_code == 200
    alone = NetworkServer(finished / "seed-0/experts/digits/expert.safetensors", 10, read(finished).decoder)
    expected = alone(torch.tensor(images)).logits.softmax(1)
    own = next(found for found in (ask("digits") for _ in range(20)) if not found[0])
    assert own[1] == "expert-digits"
    torch.testing.assert_close(torch.tensor(own[2]).view(3, 10), expected, rtol=0, atol=1e-5)
    assert client.post("/v2/models/all/infer", json=body).status_code == 200
    os.kill(replica("expert-digits", process.pid), signal.SIGKILL)
    assert [ask("digits")[:2] for _ in range(3)] == [(True, "expert-letters,coded-0")] * 3
    assert client.post("/v2/models/magic/infer", json=body).status_code == 404
    assert client.get("/health").json()["queries"]["decoded"] >= 3
    slow = [socket.create_connection(("127.0.0.1", client.base_url.port)) for _ in range(14)]
    for connection in slow:
        head = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        connection.sendall(head + bytes(1000))
    time.sleep(0.5)
    began = time.monotonic()
    assert client.get("/health").status_code == 200
    ask("letters")
    assert time.monotonic() - began < 2
    for connection in slow:
        connection.close()
    began = time.monotonic()
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as under_way:
        head = f"POST /v2/models/letters/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        under_way.sendall(head.encode() + content[:100])
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        refused = client.post("/v2/models/letters/infer", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        under_way.sendall(content[100:])
        assert under_way.recv(100).startswith(b"HTTP/1.1 200")
    assert process.wait(60) == 0
    assert time.monotonic() - began < 20  # 41 s, before the servers were told that there is nothing to wait for
    assert "failed to shut down" not in (tmp_path / "said").read_text()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="it finds the servers' processes in /proc")
def test_a_client_gets_answers_while_none_one_and_all_experts_are_killed(alone: Path) -> None:
    pytest.importorskip("ray", reason="Ray Serve is not installed: pip install '.[serve]'")
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "tests/benchmarks/standins.py"), str(alone), "--method=coin", "--seconds=5"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    phases = [line.split()[3:] for line in found.stdout.splitlines() if " of 2 " in line]
    assert [phase[1] for phase in phases] == ["0", "0", "0"]  # failed
    assert 0 < int(phases[1][2]) < int(phases[1][0])
    assert int(phases[2][2]) > int(phases[2][0]) / 2  # decoded; between two kills an expert may answer


@pytest.mark.parametrize("decoder", ["linear", "expert_head"])
def test_a_decoder_that_needs_no_samples_serves_without_and_says_that_it_tells_no_risk(
    alone: Path, tmp_path: Path, decoder: str
) -> None:
    other = shutil.copytree(alone, tmp_path / "copy", ignore=shutil.ignore_patterns("decoders"))
    for config in other.glob("seed-*/config.yaml"):
        config.unlink()
    with pytest.warns(CoinWarning, match="will have no risk estimate"):
        system = read(other, decoder=decoder)
    assert system.decodings is not None
    assert all(decoder.moments is None for decoder in system.decodings.fitted.values())
    with pytest.raises(FileError, match="use --decoder=linear"):
        read(other, decoder="feature_ridge-alone")
