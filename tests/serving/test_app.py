"""The application over real HTTP on loopback, with servers in this process instead of Ray's."""

import asyncio
import base64
import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from coin.coding import Code
from coin.errors import ConfigurationError
from coin.serving.decodings import Decodings, coded_layout
from coin.serving.front_end import FrontEnd
from coin.serving.limits import InputLimits, Limits
from coin.serving.policies import Policy, PolicyKind
from coin.serving.protocol import Description
from coin.serving.replies import Reply, ReplyFormat

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install '.[serve]'")
uvicorn = pytest.importorskip("uvicorn")

from coin.serving.app import make_app  # noqa: E402 (needs FastAPI)

CODE = Code([[0.5, 0.5]])
CLASSES = {"colours": ["red", "green", "blue"], "lights & darks": ["light", "dark"]}


class Toy:
    """Two experts and an exact coded model for images of one colour, each of which can be told to fail."""

    def __init__(self, inputs: InputLimits, **limits: Any) -> None:
        self.ways = ["", "", ""]
        self.front = FrontEnd(
            {name: self._server(index) for index, name in enumerate(["expert-colours", "expert-lights", "coded-0"])},
            coded_layout(CODE),
            Policy(PolicyKind.coded_hedged),
            ReplyFormat(3),
            torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
            Decodings(CODE),
            Limits(**{"initial_lateness": 30.0, "deadline": 60.0, "timeout": 60.0, **limits}),
        )
        self.app = make_app(
            self.front, Description(CLASSES, 8, "coin (coded_hedged, average, linear)"), inputs, "the first"
        )

    def _server(self, index: int) -> Any:
        async def answer(images: torch.Tensor) -> Reply:
            if self.ways[index] == "raise":
                raise RuntimeError("gone")
            if self.ways[index] == "hang":
                await asyncio.sleep(3600)
            colours = images.float().mean((2, 3)) / 255
            light = torch.stack([colours.mean(1) - 0.5, 0.5 - colours.mean(1), torch.zeros(len(images))], 1)
            outputs = (colours, light, 0.5 * colours + 0.5 * light)
            return Reply(10 * outputs[index])

        return answer


@pytest.fixture
def serve_toy() -> Iterator[Any]:
    """Return a function that serves a toy in the background and returns it with a client and its port."""
    running = []

    def serve(inputs: InputLimits | None = None, **limits: Any) -> tuple[Toy, httpx.Client, int]:
        toy = Toy(inputs or InputLimits(bytes=5000, pixels=1000, samples=4), **limits)
        bound = socket.create_server(("127.0.0.1", 0))  # handed over: a free port could be gone when it is asked for
        port = bound.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(toy.app, log_level="error", lifespan="on"))
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        running.append((toy, server, thread, client))
        while not server.started:
            assert thread.is_alive(), "the server ended before it began"
            time.sleep(0.01)
        return toy, client, port

    yield serve
    for toy, server, thread, client in running:
        client.close()
        server.should_exit = True
        server.force_exit = True
        thread.join(20)
        assert not thread.is_alive()
        assert not toy.front.can_answer()  # it was stopped with the application


def plain(*colour: int) -> np.ndarray:
    return np.tile(np.array(colour, np.uint8)[:, None, None], (1, 6, 6))


def png(*colour: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(plain(*colour).transpose(1, 2, 0)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def files(*contents: str) -> dict[str, Any]:
    return {"inputs": [{"name": "images", "datatype": "BYTES", "shape": [len(contents)], "data": list(contents)}]}


def pixels(images: np.ndarray) -> dict[str, Any]:
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape), "data": images.flatten().tolist()}
    return {"id": "7", "inputs": [tensor]}


def ask(client: httpx.Client, model: str, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the response and the data of its outputs by name."""
    found = client.post(f"/v2/models/{model}/infer", json=body)
    assert found.status_code == 200, found.text
    return found.json(), {output["name"]: output["data"] for output in found.json()["outputs"]}


def test_own_and_decoded_answers(serve_toy: Any) -> None:
    toy, client, _ = serve_toy()
    own, data = ask(client, "colours", files(png(0, 200, 0)))
    assert (own["parameters"]["decoded"], own["parameters"]["answered_by"]) == (False, "expert-colours")
    assert (data["class"], data["label"]) == ([1], ["green"])
    assert sum(data["probabilities"]) == pytest.approx(1)
    toy.ways[0] = "raise"
    decoded, again = ask(client, "colours", pixels(plain(0, 200, 0)[None]))
    assert (decoded["parameters"]["decoded"], decoded["parameters"]["answered_by"]) == (True, "expert-lights,coded-0")
    assert decoded["id"] == "7"
    assert again["probabilities"] == pytest.approx(data["probabilities"], abs=1e-5)
    every, data = ask(client, "all", pixels(np.stack([plain(0, 0, 90), plain(90, 0, 0)])))
    assert data["colours.label"] == ["blue", "red"]
    said = {output["name"]: output["parameters"]["decoded"] for output in every["outputs"]}
    assert (said["colours.class"], said["lights & darks.class"]) == (True, False)
    shapes = {output["name"]: output["shape"] for output in every["outputs"]}
    assert shapes["lights & darks.probabilities"] == [2, 2]


def test_readiness_metrics_and_description(serve_toy: Any) -> None:
    toy, client, _ = serve_toy(failures=1, cooldown=0.2)
    assert client.get("/v2/health/live").status_code == client.get("/v2/health/ready").status_code == 200
    metadata = client.get("/v2/models/colours").json()
    assert metadata["parameters"] == {"colours.classes": "red,green,blue"}
    assert {output["name"] for output in metadata["outputs"]} == {"probabilities", "class", "label", "risk"}
    toy.ways[0] = "raise"
    ask(client, "colours", files(png(9, 0, 0)))
    health = client.get("/health").json()
    assert health["servers"]["expert-colours"] == {"up": False, "requests": 0, "last_error": "RuntimeError: gone"}
    assert health["queries"] == {"answered": 1, "decoded": 1}
    assert client.get("/v2/health/ready").status_code == 200  # the others make up for it
    toy.ways[2] = "raise"
    lost = client.post("/v2/models/colours/infer", json=files(png(9, 0, 0)))
    assert (lost.status_code, lost.json()["kind"]) == (503, "LostError")
    assert client.get("/v2/health/ready").status_code == 503
    assert client.get("/v2/models/colours/ready").status_code == 503
    assert client.get("/v2/models/lights & darks/ready").status_code == 200
    metrics = client.get("/metrics").text
    for line in (
        'coin_queries_total{end="lost",front_end="the first"} 1.0',
        'coin_server_up{front_end="the first",server="coded-0"} 0.0',
        'coin_decoded_answers_total{front_end="the first"} 1.0',
    ):
        assert line in metrics
    toy.ways = ["", "", ""]
    time.sleep(1.0)  # and nobody asks
    assert client.get("/v2/health/ready").status_code == 200
    assert "/v2/models/{model}/infer" in client.get("/openapi.json").json()["paths"]


def test_deadline_and_too_many_queries(serve_toy: Any) -> None:
    toy, client, _ = serve_toy(deadline=0.4, queries=1)
    toy.ways = ["hang"] * 3
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: client.post("/v2/models/colours/infer", json=files(png(9, 0, 0))), range(2)))
    assert {(each.status_code, each.json()["kind"]) for each in found} == {
        (504, "DeadlineError"),
        (429, "OverloadedError"),
    }


def wrong(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{**pixels(plain(1, 2, 3)[None])["inputs"][0], **changes}]}


MISTAKES = {
    "path": ("/nothing", {}, 404, '{"error":"found POST /nothing (Not Found), expected a path of /openapi.json"'),
    "method": ("/v2/health/live", {}, 405, '{"error":"found POST /v2/health/live (Method Not Allowed)'),
    "version": ("/v2/models/colours/versions/2/infer", wrong(), 404, "version '2' of model 'colours', expected 1"),
    "model": ("/v2/models/magic/infer", wrong(), 404, "expected one of colours, lights & darks, all"),
    "no request": ("/v2/models/colours/infer", {"a": 1}, 400, "wrong at inputs"),
    "datatype": ("/v2/models/colours/infer", wrong(datatype="FP32"), 400, "inputs.0.datatype"),
    "shape": ("/v2/models/colours/infer", wrong(shape=[6, 6, 3]), 400, "[B, 1 or 3, H, W]"),
    "too few values": ("/v2/models/colours/infer", wrong(data=[1, 2]), 400, "found 2 values for an array"),
    "ragged": ("/v2/models/colours/infer", wrong(data=[[1], [2, 3]]), 400, "no array"),
    "no pixels": ("/v2/models/colours/infer", wrong(data=[300] * 108), 400, "from 0 to 255"),
    "no data": ("/v2/models/colours/infer", wrong(data=None), 400, "without data"),
    "no image": ("/v2/models/colours/infer", files("aGVsbG8="), 400, "neither PNG nor JPEG"),
    "no base64": ("/v2/models/colours/infer", files("%%"), 400, "base64"),
    "rows": ("/v2/models/colours/infer", wrong(datatype="BYTES", shape=[3], data=["aGVsbG8="]), 400, "one a row"),
    "too many": ("/v2/models/colours/infer", files(*["aGVsbG8="] * 5), 413, "1 to 4 at a time"),
    "none": ("/v2/models/colours/infer", files(), 400, "found 0 images"),
    "too large": ("/v2/models/colours/infer", wrong(data=[0] * 9000), 413, "5000 bytes"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_a_status_and_one_line(serve_toy: Any, case: str) -> None:
    path, body, status, message = MISTAKES[case]
    _, client, _ = serve_toy()
    found = client.post(path, json=body)
    assert found.status_code == status
    assert message in found.text
    assert "\n" not in found.text


def test_a_header_that_is_no_number_is_a_mistake_like_others(serve_toy: Any) -> None:
    _, client, _ = serve_toy()
    headers = {"Inference-Header-Content-Length": "many"}
    found = client.post("/v2/models/colours/infer", content=b"{}", headers=headers)
    assert found.status_code == 400
    assert "inference-header-content-length" in found.json()["error"]


@pytest.mark.parametrize("length", ["many", "-5", "", "1_0"])
def test_a_length_that_is_no_number_is_a_mistake_whatever_server_is_before(length: str) -> None:
    app = Toy(InputLimits()).app

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            headers = {"content-length": length}
            return await client.post("http://x/v2/models/colours/infer", content=b"{}", headers=headers)

    found = asyncio.run(ask())
    assert found.status_code == 400
    assert found.json()["error"] == f"found a Content-Length of {length!r}, expected a number of bytes"


def test_body_that_does_not_tell_its_length_is_not_read_beyond_the_limit(serve_toy: Any) -> None:
    _, client, _ = serve_toy()
    found = client.post("/v2/models/colours/infer", content=(bytes(1000) for _ in range(100)))
    assert found.status_code == 413


@pytest.mark.parametrize("length", ["Content-Length: 300000", "Transfer-Encoding: chunked"])
def test_a_client_that_still_sends_is_told_why_it_is_refused(serve_toy: Any, length: str) -> None:
    """A connection that is closed with half of the body on its way is reset, and the answer may be lost."""
    _, client, port = serve_toy(InputLimits(bytes=1000))
    part = bytes(100_000) if "Content" in length else b"186a0\r\n" + bytes(100_000) + b"\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST /v2/models/colours/infer HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n"
        connection.sendall(head.encode())
        for _ in range(3):
            connection.sendall(part)
            time.sleep(0.3)
        connection.sendall(b"" if "Content" in length else b"0\r\n\r\n")
        connection.settimeout(5)
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 413")
    assert client.get("/health").status_code == 200


def half_sent(port: int, length: int = 1_000_000) -> socket.socket:
    """Begin an upload and send a hundred bytes of it."""
    connection = socket.create_connection(("127.0.0.1", port))
    head = f"POST /v2/models/colours/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + bytes(100))
    return connection


def test_half_sent_bodies_hold_nobody_up_and_end(serve_toy: Any) -> None:
    _, client, port = serve_toy(InputLimits(bytes=2_000_000, seconds=1.5), queries=16)
    slow = [half_sent(port) for _ in range(14)]
    time.sleep(0.3)
    began = time.monotonic()
    assert client.get("/health").status_code == 200
    ask(client, "colours", files(png(9, 0, 0)))
    assert time.monotonic() - began < 1.0
    slow += [half_sent(port) for _ in range(2)]
    time.sleep(0.2)
    assert client.post("/v2/models/colours/infer", json=files(png(9, 0, 0))).status_code == 429  # and not for ever
    for connection in slow:
        connection.settimeout(5)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        connection.close()
    ask(client, "colours", files(png(9, 0, 0)))


def test_a_hundred_slow_bodies_refuse_nobody_else(serve_toy: Any) -> None:
    _, client, port = serve_toy(InputLimits(seconds=3.0))
    slow = [half_sent(port) for _ in range(100)]
    time.sleep(0.3)
    began = time.monotonic()
    for _ in range(20):
        ask(client, "colours", files(png(9, 0, 0)))
    assert time.monotonic() - began < 2
    for connection in slow:
        connection.close()


def test_the_deadline_begins_before_the_body_is_read(serve_toy: Any) -> None:
    toy, _, port = serve_toy(deadline=1.5)
    toy.ways = ["hang"] * 3
    content = json.dumps(files(png(9, 0, 0))).encode()
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST /v2/models/colours/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content[:50])
        time.sleep(1.0)
        connection.sendall(content[50:])
        assert connection.recv(100).startswith(b"HTTP/1.1 504")
    assert time.monotonic() - began < 2.3


@pytest.mark.slow
def test_a_front_end_starts_without_what_only_training_needs() -> None:
    """Lightning took ten of the fifteen seconds in which a front end that was killed was back, on two busy cores."""
    names = "coin.serving.app, coin.serving.ray_app, coin.serving.model"
    code = f"import sys, {names}; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def binary(tensor: dict[str, Any], raw: bytes) -> dict[str, Any]:
    """Return the content and the headers of a request in the binary extension."""
    head = json.dumps({"inputs": [{"name": "images", **tensor}]}).encode()
    return {"content": head + raw, "headers": {"Inference-Header-Content-Length": str(len(head))}}


def test_a_strip_of_pixels_is_the_clients_mistake_and_reaches_no_server(serve_toy: Any) -> None:
    _, client, _ = serve_toy(InputLimits())
    began = time.monotonic()
    strip = binary({"datatype": "UINT8", "shape": [1, 1, 8_380_000, 1]}, bytes(8_380_000))
    found = client.post("/v2/models/colours/infer", **strip)
    assert (found.status_code, time.monotonic() - began < 2) == (400, True)
    assert "found an image of 1 × 8380000 pixels, expected sides of at most 1 : 20" in found.json()["error"]
    health = client.get("/health").json()
    assert health["queries"] == {"refused": 1}
    assert all(server["up"] and not server["last_error"] for server in health["servers"].values())
    wide = binary({"datatype": "UINT8", "shape": [1, 1, 500, 2000]}, bytes([0, 255]) * 500_000)
    assert client.post("/v2/models/colours/infer", **wide).status_code == 200


def test_large_images_wait_in_a_line_of_their_own_and_are_refused_beyond_the_budget(serve_toy: Any) -> None:
    """Two queries of 64 blank images of 4096² held an ordinary one up for 15 s on two cores."""
    _, client, _ = serve_toy(InputLimits())
    buffer = io.BytesIO()
    Image.new("L", (4096, 4096)).save(buffer, "PNG")
    image = struct.pack("<I", len(buffer.getvalue())) + buffer.getvalue()
    statuses: list[int] = []
    waited: list[float] = []

    def large(count: int) -> None:
        body = binary({"datatype": "BYTES", "shape": [count]}, count * image)
        found = client.post("/v2/models/colours/infer", **body)
        statuses.append(found.status_code)
        assert found.headers.get("retry-after") == ("1" if found.status_code == 429 else None)

    with ThreadPoolExecutor(8) as pool:
        works = [pool.submit(large, count) for count in (64, 64, 4, 4, 4, 4, 2, 2)]
        while not all(work.done() for work in works):
            began = time.monotonic()
            ask(client, "colours", files(png(9, 0, 0)))
            waited.append(time.monotonic() - began)
        for work in works:
            work.result()
    assert statuses.count(413) == 2
    assert statuses.count(429) >= 2  # what is decoded at a time is bounded
    assert 200 in statuses
    assert max(waited) < 2
    health = client.get("/health").json()
    assert health["queries"]["overloaded"] == statuses.count(429)
    assert health["servers"]["expert-colours"]["last_error"] == ""
    assert 'coin_reading{front_end="the first",unit="pixels"} 0.0' in client.get("/metrics").text


def test_a_task_may_not_have_the_name_of_all(serve_toy: Any) -> None:
    toy, _, _ = serve_toy()
    with pytest.raises(ConfigurationError, match="a task 'all'"):
        make_app(toy.front, Description({"all": ["a"]}, 8, "coin"), InputLimits())


@pytest.fixture
def triton(serve_toy: Any) -> Iterator[tuple[Any, Any, Toy]]:
    """The module of Triton's client, a client, and what it is served by."""
    module = pytest.importorskip("tritonclient.http", reason="pip install 'tritonclient[http]'")
    toy, _, port = serve_toy()
    client = module.InferenceServerClient(f"127.0.0.1:{port}")
    yield module, client, toy
    client.close()


def of_pixels(module: Any, image: np.ndarray, binary: bool = True, name: str = "images") -> Any:
    tensor = module.InferInput(name, [1, *image.shape], "UINT8")
    tensor.set_data_from_numpy(image[None], binary_data=binary)
    return tensor


def test_tritons_client_finds_what_the_metadata_says(triton: tuple[Any, Any, Toy]) -> None:
    module, client, _ = triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    for model in ("colours", "lights & darks", "all"):
        metadata = client.get_model_metadata(model)
        assert metadata == client.get_model_metadata(model, metadata["versions"][0])
        assert client.is_model_ready(model)
        assert client.is_model_ready(model, "1")
        assert not client.is_model_ready(model, "2")
        found = client.infer(model, [of_pixels(module, plain(0, 200, 0))], model_version="1", request_id="x")
        assert (found.get_response()["model_version"], found.get_response()["id"]) == ("1", "x")
        kinds = {"FP32": np.float32, "INT64": np.int64, "BYTES": np.object_}
        for output in metadata["outputs"]:
            array = found.as_numpy(output["name"])
            assert array.dtype == kinds[output["datatype"]]
            assert array.shape == (1, *output["shape"][1:])


@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_reads_a_decoded_answer(triton: tuple[Any, Any, Toy], binary: bool, packed: str | None) -> None:
    module, client, toy = triton
    toy.ways[0] = "raise"
    asked = [module.InferRequestedOutput(name, binary_data=binary) for name in ("label", "class", "risk")]
    tensor = of_pixels(module, plain(0, 200, 0), binary)
    found = client.infer("colours", [tensor], outputs=asked, request_compression_algorithm=packed)
    said = found.get_response()
    assert [output["name"] for output in said["outputs"]] == ["class", "label", "risk"]  # and no probabilities
    assert all(("data" in output) != binary for output in said["outputs"])
    assert (said["parameters"]["decoded"], said["parameters"]["answered_by"]) == (True, "expert-lights,coded-0")
    assert found.as_numpy("class").tolist() == [1]
    assert found.as_numpy("risk").tolist() == [1.0]  # no decoder was fitted: nothing is known
    assert [str(each, "utf-8") if binary else each for each in found.as_numpy("label")] == ["green"]
    files_input = module.InferInput("images", [1], "BYTES")
    files_input.set_data_from_numpy(np.array([base64.b64decode(png(0, 200, 0))], dtype=object), binary_data=True)
    assert client.infer("colours", [files_input]).as_numpy("label").tolist() == [b"green"]


def test_tritons_client_is_told_its_mistakes(triton: tuple[Any, Any, Toy]) -> None:
    module, client, _ = triton
    image, error = plain(0, 200, 0), module.InferenceServerException
    with pytest.raises(error, match="expected 'images'"):
        client.infer("colours", [of_pixels(module, image, name="pictures")])
    with pytest.raises(error, match="found output 'magic'"):
        client.infer("colours", [of_pixels(module, image)], outputs=[module.InferRequestedOutput("magic")])
    with pytest.raises(error, match="not supported"):
        client.infer(
            "colours", [of_pixels(module, image)], outputs=[module.InferRequestedOutput("label", class_count=2)]
        )
    with pytest.raises(error, match="version '2'"):
        client.infer("colours", [of_pixels(module, image)], model_version="2")
    with pytest.raises(error, match="found model 'magic'"):
        client.get_model_metadata("magic")
    with pytest.raises(error, match=r"found GET /v2/systemsharedmemory/status \(Not Found\)"):
        client.get_system_shared_memory_status()


SECONDS = float(os.environ.get("COIN_LOAD_SECONDS", "4"))
"""How long the mixed load lasts; 300 for evidence."""


@pytest.mark.slow
def test_good_clients_are_served_among_slow_oversized_and_broken_ones(serve_toy: Any) -> None:
    """No answer is wrong, nobody waits longer than the deadline and a bit, and memory does not grow."""
    limits = InputLimits(bytes=300_000, pixels=10_000, samples=64, seconds=1.0)
    toy, client, port = serve_toy(limits, timeout=0.5, deadline=3.0, initial_lateness=0.1, cooldown=0.2)
    end, draw = time.monotonic() + SECONDS, random.Random(0)
    counts: Counter[str] = Counter()
    waited: list[float] = []
    memory: list[int] = []

    def good(number: int) -> None:
        own = random.Random(number)
        with httpx.Client(base_url=client.base_url, timeout=20) as http:
            while time.monotonic() < end:
                colours = [[own.randrange(256) for _ in range(3)] for _ in range(own.choice([1, 1, 1, 3, 64]))]
                body = pixels(np.stack([plain(*colour) for colour in colours]))
                began = time.monotonic()
                found = http.post("/v2/models/colours/infer", json=body)
                waited.append(time.monotonic() - began)
                counts[str(found.status_code)] += 1
                if found.status_code == 200:
                    data = {output["name"]: output["data"] for output in found.json()["outputs"]}
                    counts["decoded"] += found.json()["parameters"]["decoded"]
                    likely = torch.tensor(colours).float().mul(10 / 255).softmax(1)
                    given = torch.tensor(data["probabilities"]).view(-1, 3)
                    counts["wrong"] += int(not torch.allclose(given, likely, atol=1e-4))
                else:
                    assert found.status_code in (503, 504), found.text

    def slow() -> None:
        while time.monotonic() < end:
            connections = [half_sent(port, 200_000) for _ in range(14)]
            for connection in connections:
                connection.settimeout(10)
                counts["told to hurry"] += connection.recv(100).startswith(b"HTTP/1.1 408")
                connection.close()

    def broken() -> None:
        with httpx.Client(base_url=client.base_url, timeout=20) as http:
            while time.monotonic() < end:
                half_sent(port, 1000).close()
                bodies: list[Any] = [bytes(400_000), b"{", os.urandom(2000), b'{"inputs": [' + b"[" * 2000]
                for body in bodies:
                    status = http.post("/v2/models/all/infer", content=body).status_code
                    assert status in (400, 413, 503), status
                    counts["refused"] += 1
                assert http.get("/health").status_code == 200
                time.sleep(0.01)

    def trouble() -> None:
        toy.ways[0] = "raise"  # so that some are decoded however few turns there are
        time.sleep(0.5)
        while time.monotonic() < end:
            toy.ways[draw.randrange(3)] = draw.choice(["", "", "raise", "hang"])
            toy.ways[draw.randrange(3)] = ""
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if Path("/proc").exists() else 0)
            time.sleep(0.3)

    with ThreadPoolExecutor(16) as pool:
        works = [pool.submit(good, number) for number in range(6)]
        works += [pool.submit(work) for work in (slow, slow, broken, broken, trouble)]
        for work in works:
            work.result()
    print(
        dict(counts),
        f"longest wait {max(waited):.2f} s",
        f"memory {memory[len(memory) // 4] >> 20} → {memory[-1] >> 20} MiB",
    )
    assert counts["wrong"] == 0
    assert counts["200"] > 20 * SECONDS
    assert counts["decoded"] > 0
    assert counts["told to hurry"] > 0
    assert max(waited) < 8
    assert max(memory) - memory[len(memory) // 4] < 200 * 2**20
    toy.ways = ["", "", ""]
    time.sleep(1)
    assert client.get("/v2/health/ready").status_code == 200
